"""Short runs with all defaults enabled, for fault injection."""

from fault_injection import IMPORT

TOTAL, TICK = 9600, 640
SETTINGS = [
    f"run.total_samples={TOTAL}",
    f"run.log_every_samples={TICK}",
    f"run.checkpoint_every_samples={TICK}",
    "run.global_batch=32",
    'model.generator={name="residual", width=8}',
    'model.discriminator={name="residual", width=8}',
    'game.augmentation={name="ada", adjust_samples=20000}',
    'evaluate.metrics=["swd"]',
    "evaluate.features=points",
    "evaluate.num_samples=256",
    f"evaluate.every_samples={3 * TICK}",
    "cluster.heartbeat_timeout_s=20",
    "cluster.straggler_warn_s=4",
    "cluster.backend=gloo",
]
# Shorter ones, for workers on this machine.
SHORT = [
    "run.total_samples=1920",
    "run.log_every_samples=160",
    "run.checkpoint_every_samples=640",
    "run.global_batch=16",
    "run.reduction=canonical",
    'model.generator={name="residual", width=8}',
    'model.discriminator={name="residual", width=8}',
    'evaluate.metrics=["swd"]',
    "evaluate.features=points",
    "evaluate.num_samples=256",
    "evaluate.every_samples=960",
]
CANONICAL = ["run.reduction=canonical", "run.virtual_workers=2"]
# Prefix of plugins that inject faults.
HEAD = (
    IMPORT
    + """
import itertools, os, pathlib, signal, time
folder = pathlib.Path(__file__).parent
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def freeze(): os.kill(os.getpid(), signal.SIGSTOP)
def hang(): time.sleep(1000)
numbers = itertools.count()
def once(action):  # only the first worker that comes to it does it
    name = f"once-{next(numbers)}"
    def act():
        try: (folder / name).touch(exist_ok=False)
        except FileExistsError: return
        action()
    return act
def note(name): (folder / name).write_text(f"{os.getpid()} {time.time()} {os.uname().nodename}")
"""
)
