"""A Ray job for `test_ray_job.py`: prints, as JSON, what a worker has of the attention operator."""

import json
import os
from pathlib import Path

import ray


@ray.remote
def look() -> dict[str, object]:
    import model
    from model.ops.operator import compiled, kernels

    return {
        "process": os.getpid(),
        "model": model.__file__,
        "compiled": compiled("cpu"),
        "extension": kernels.EXTENSION.__file__ if kernels else None,
        "carried": [path.name for path in Path(model.__file__).parents[1].glob("*.so")],
    }


if __name__ == "__main__":
    ray.init()
    print(json.dumps({"driver": os.getpid(), **ray.get(look.remote())}))
