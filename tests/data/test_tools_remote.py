"""Index, verify, stats and reshard of shards behind a real web server, against the same shards on the disk."""

from __future__ import annotations

import json
import shutil

import pytest
from web_server import WebServer

from fdscale import UserError
from fdscale.data.index import open_index
from fdscale.data.indexing import index
from fdscale.data.reshard import reshard
from fdscale.data.shard_cache import ShardCache
from fdscale.data.stats import stats
from fdscale.data.verify import verify

pytestmark = pytest.mark.slow  # together they are: left out of `make quick`


@pytest.fixture
def local(tmp_path, pack, members):
    folder = tmp_path / "local"
    for i, count in enumerate((5, 7, 4)):
        pack(folder / f"s-{i}.tar", members(count, first=100 * i))
    cut = folder / "s-1.tar"
    cut.write_bytes(cut.read_bytes()[:7000])
    return folder


@pytest.fixture
def web(local):
    with WebServer({path.name: path.read_bytes() for path in local.glob("*.tar")}) as server:
        yield server


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_a_damaged_remote_set_is_treated_like_a_local_one(local, web, tmp_path):
    where, cache = f"{web.url}/s-{{0..2}}.tar", ShardCache(str(tmp_path / "cache"))
    index_dir = str(tmp_path / "index")
    with pytest.raises(UserError, match="1 of 3 shards cannot be used"):
        index(where, index_dir, cache=cache)
    reported = []
    remote = index(where, index_dir, cache=cache, skip_damaged=True, report=reported.append)
    ours = index(local, skip_damaged=True)
    assert (remote.counts.tolist(), remote.left_out) == (ours.counts.tolist(), ours.left_out)
    assert remote.fingerprint == ours.fingerprint
    assert (tmp_path / "index" / "left-out.jsonl").read_text() == (local / "index" / "left-out.jsonl").read_text()
    assert len(reported) == len((tmp_path / "index" / "left-out.jsonl").read_text().splitlines())
    gets = web.gets()
    again = index(where, index_dir, cache=cache, skip_damaged=True)
    assert (again.left_out, web.gets()) == (ours.left_out, gets)  # known without being fetched
    problems = verify(where, index_dir, cache=cache)
    assert problems
    assert all(problem.left_out for problem in problems)
    found, expected = stats(where, index_dir, cache=cache), stats(local)
    assert found == expected
    reshard(where, tmp_path / "a", index_dir=index_dir, seed=1, cache=cache)
    reshard(local, tmp_path / "b", seed=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert web.gets() == gets


def test_verify_names_what_changed_at_the_source(local, web, tmp_path):
    where, index_dir = f"{web.url}/s-{{0,2}}.tar", str(tmp_path / "index")
    index(where, index_dir, cache=ShardCache(str(tmp_path / "cache")))
    web.files["s-2.tar"] = web.files["s-0.tar"]
    fresh = ShardCache(str(tmp_path / "other"))
    (problem,) = verify(where, index_dir, cache=fresh)
    assert problem.shard == "s-2.tar"
    assert "changed since it was indexed" in problem.reason


def test_counts_of_a_list_at_hand(local, web, tmp_path):
    (tmp_path / "sizes.json").write_text(json.dumps({"s-0.tar": 6, "s-2.tar": 4}))
    where, cache = f"{web.url}/s-{{0,2}}.tar", ShardCache(str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"s-0\.tar: holds 5 samples, .*sizes\.json says 6"):
        index(where, str(tmp_path / "index"), cache=cache, counts=[str(tmp_path / "sizes.json")])
    shutil.rmtree(tmp_path / "index")
    index(where, str(tmp_path / "index"), cache=cache)
    assert open_index(where, str(tmp_path / "index"), cache).samples == 9
