"""`fdscale tune`: which ds_config, micro-batch and memory policy is fastest here, by measuring real steps."""
