"""`fdscale plan`: memory, time and cost of a run from its recipe and ds_config, without a GPU.

shapes.py     the networks on the meta device, and what a step of theirs keeps and needs
memory.py     bytes per GPU and per node, by ZeRO stage
pace.py       seconds of a step, and what follows from them
machines.py   GPUs and networks: data sheets, and what is assumed of them
search.py     the cheapest configuration that fits
report.py     what is printed
options.py    the command line
app.py        the verb
"""
