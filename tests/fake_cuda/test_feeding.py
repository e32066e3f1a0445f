"""Feeding a GPU: page-locked batches, decoding threads, and the order of copies and events.

In processes with fake CUDA devices, whose streams note what is done with them.
"""

import json
import textwrap

from test_budgets import device, finish, start  # noqa: F401  (a fixture)


def result_of(script):
    begin = "import fake_device; fake_device.load(); import json, torch\n"
    return json.loads(finish(start("-c", begin + textwrap.dedent(script))))


def test_steps_wait_for_copies_and_the_host_for_the_copy_before():
    found = result_of("""
        import ctypes
        from torch.utils._python_dispatch import TorchDispatchMode
        from fake_cases import CUDA, fake_cuda
        from gatdist.data.loader import Batch
        from gatdist.training.copies import Copies

        library = ctypes.CDLL(str(fake_device.library()))
        library.take_stream_log.restype = ctypes.c_char_p
        lines = []

        def take():
            lines.extend(library.take_stream_log().decode().splitlines())

        class Note(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                take()
                name = func.__name__.partition(".")[0]
                if name == "record_stream":  # it has no fake kernel
                    lines.append(f"used on {args[1].stream_id}")
                    return None
                if name == "_to_copy":
                    stream = torch.accelerator.current_stream(CUDA).stream_id
                    lines.append(f"copy on {stream}")
                return func(*args, **(kwargs or {}))

        with fake_cuda():
            copies = Copies(CUDA)
            numbers = torch.empty(4, dtype=torch.int64)
            batch = Batch(torch.empty(4, 3, 8, 8, dtype=torch.uint8), numbers, numbers.clone())
            with Note():
                for _ in range(2):
                    copied = copies(batch)
                    take()
            devices = {str(t.device) for t in (copied.samples, copied.labels, copied.positions)}
            stream = torch.accelerator.current_stream(CUDA).stream_id
        print(json.dumps([lines, sorted(devices), stream]))
    """)
    copy = ["copy on 1"] * 3

    def use(event):
        return [f"record {event} on 1", f"stream 0 waits for {event}", *["used on 0"] * 3]

    assert found == [[*copy, *use(1), "host waits for 1", *copy, *use(2)], ["cuda:0"], 0]


def test_pinned_batches_are_bounded_and_equal():
    same, num_buffers, threads = result_of("""
        import threading
        from gatdist.config import load_config
        from gatdist.data import dataset as datasets, loader as loaders
        from gatdist.data.order import SampleOrder
        from gatdist.parallel.communicator import LocalCommunicator

        datasets._DECODED_BYTES = 0
        config = load_config("digits", ["data.prefetch_batches=3"])
        dataset = datasets.open_dataset(config.data)
        order = SampleOrder.from_config(config, dataset.layout)
        here = {"host": "here", "cores": list(range(32)), "quota": None}
        loaders.whereabouts = lambda host: here
        comm = LocalCommunicator(torch.device("cuda", 0))
        comm.all_gather_object = lambda mine: [mine] * 4

        def opened(comm):
            return loaders.Loader.for_worker(dataset, order, config, comm, position=0)

        same, buffers, last = True, set(), None
        with opened(comm) as pinned, opened(LocalCommunicator(torch.device("cpu"))) as plain:
            threads = sum(thread.name.startswith("decode") for thread in threading.enumerate())
            for _ in range(40):
                batch, other = next(pinned), next(plain)
                for name in ("samples", "labels", "positions"):
                    same &= getattr(batch, name).equal(getattr(other, name))
                buffers.add(batch.samples.data_ptr())
                last = batch  # whose copy may not have ended
        print(json.dumps([same, len(buffers), threads]))
    """)
    assert same
    assert num_buffers <= 5  # 3 ahead, one in use, one whose copy has just ended
    assert threads == 7 + 1  # a quarter of 32 cores less one; one on the CPU
