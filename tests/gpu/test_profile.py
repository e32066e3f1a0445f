"""Profiles on a CUDA device: kernels, and a snapshot of its memory."""

import gzip
import json

import pytest
import torch

import gatdist

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_profile_has_kernels_and_memory_history(tmp_path):
    settings = ["run.total_samples=640", "evaluate.metrics=[]", "monitor.profile_steps=[4, 7]"]
    gatdist.train(gatdist.load_config("digits", settings), str(tmp_path), local=True)
    (window,) = (tmp_path / "profiles").iterdir()
    endings = {path.name.partition(".")[2] for path in window.iterdir()}
    assert endings == {"pt.trace.json.gz", "txt", "memory.pickle"}
    trace = json.loads(gzip.decompress((window / "rank-0.pt.trace.json.gz").read_bytes()))
    kinds = {event.get("cat") for event in trace["traceEvents"]}
    assert {"kernel", "gpu_user_annotation", "user_annotation"} <= kinds
    assert (window / "rank-0.memory.pickle").stat().st_size > 1000
