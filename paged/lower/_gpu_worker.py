"""Compiles one exported function for a GPU that need not be there: ``python -m paged.lower._gpu_worker FOLDER``.

It is a process of its own, because a kernel that a chip cannot do may end the process, and because XLA reads its flags
once. `_compile_gpu` starts it, and says what lies in the folder.
"""

import json
import pathlib
import sys
from typing import Any

import jax
from jax import export
from jax.experimental import topologies


def main(folder: pathlib.Path) -> None:
    """Compile ``function.bin`` for ``target.txt``, and write ``result.json``."""
    task = json.loads((folder / "task.json").read_text())
    exported = export.deserialize(bytearray((folder / "function.bin").read_bytes()))
    config = (folder / "target.txt").read_text()
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
    except Exception as error:  # a plugin that is missing, or of another version
        _write(folder, {"missing": str(error)})
        return
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in exported.in_avals]
    function = jax.jit(exported.call, donate_argnums=task["donated"], compiler_options=task["options"])
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled: Any = function.trace(*args).lower(lowering_platforms=("cuda",)).compile()
    except Exception as error:  # XLA raises many kinds, none of them public
        _write(folder, {"refused": str(error)})
        return
    memory = compiled.memory_analysis()
    names = ("argument", "output", "temp", "generated_code", "alias")
    sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in names}
    _write(folder, {"sizes": sizes, "text": compiled.as_text()})


def _write(folder: pathlib.Path, result: dict[str, Any]) -> None:
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
