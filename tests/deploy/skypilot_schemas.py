"""Print SkyPilot's schemas of a task and of its resources as JSON, in a separate process.

SkyPilot can't be installed next to this project's locked packages, and its schemas need none of
its dependencies. Importing the module that holds them would import all of SkyPilot; therefore the
parent packages are empty here, and two modules are stubs: they only supply names for settings that
our file does not use.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace


def _stub(name: str, **attributes: object) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)
    return module


def main(folder: str) -> None:
    """Print the schemas of the SkyPilot in a folder."""
    sys.path.insert(0, folder)
    _stub("sky", __path__=[f"{folder}/sky"], __version__="0", __commit__="")
    _stub("sky.skylet", __path__=[f"{folder}/sky/skylet"])
    modes = SimpleNamespace(supported_modes=lambda: ["jobs"])
    _stub("sky.skylet.autostop_lib", AutostopWaitFor=modes)
    _stub("sky.server", __path__=[])
    _stub("sky.server.daemons", INTERNAL_REQUEST_DAEMONS=[])
    from sky.utils import schemas  # type: ignore[import-not-found]

    sys.stdout.write(json.dumps([schemas.get_task_schema(), schemas.get_resources_schema()]))


if __name__ == "__main__":
    main(sys.argv[1])
