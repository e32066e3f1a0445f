"""Prints SkyPilot's schemas of a task and of its resources as JSON; run in a process of its own.

SkyPilot can't be installed beside this project's locked packages, and its schemas need none of what
it asks for. Importing the module that holds them would import all of SkyPilot; so here the packages
above it are empty, and two modules that it takes a list of names from, for settings which our file
does not have, are stand-ins.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace


def _bare(name: str, **attributes: object) -> ModuleType:
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
    _bare("sky", __path__=[f"{folder}/sky"], __version__="0", __commit__="")
    _bare("sky.skylet", __path__=[f"{folder}/sky/skylet"])
    modes = SimpleNamespace(supported_modes=lambda: ["jobs"])
    _bare("sky.skylet.autostop_lib", AutostopWaitFor=modes)
    _bare("sky.server", __path__=[])
    _bare("sky.server.daemons", INTERNAL_REQUEST_DAEMONS=[])
    from sky.utils import schemas  # type: ignore[import-not-found]

    sys.stdout.write(json.dumps([schemas.get_task_schema(), schemas.get_resources_schema()]))


if __name__ == "__main__":
    main(sys.argv[1])
