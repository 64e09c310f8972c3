"""Save a checkpoint with orbax, get killed, and resume bit for bit.

Run `python examples/jax_resume.py FOLDER` until it says done.

`--die-at STEP` kills the process without any clean-up, like a power cut.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from projgd.optax import maxnorm_projection

STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--die-at", type=int)
    args = parser.parse_args()

    # The bound grows with the step, so the projection has a state worth saving.
    tx = optax.chain(optax.adam(0.1), maxnorm_projection(lambda step: 0.5 + 0.05 * step))
    params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)) / 4, jnp.float32)}
    target = jnp.asarray(np.random.default_rng(1).standard_normal((16, 8)) * 9, jnp.float32)
    saved = {"params": params, "state": tx.init(params)}

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((p["kernel"] - target) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return {"params": optax.apply_updates(params, updates), "state": state}

    with ocp.CheckpointManager(args.folder.resolve() / "checkpoints") as manager:
        start = 0
        if manager.latest_step() is not None:
            start = manager.latest_step() + 1
            saved = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(saved))
        for i in range(start, STEPS):
            saved = step(saved["params"], saved["state"])
            manager.save(i, args=ocp.args.StandardSave(saved))
            manager.wait_until_finished()
            if i == args.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
    np.save(args.folder / "kernel.npy", saved["params"]["kernel"])
    print(f"done, from step {start}: largest norm {np.linalg.norm(saved['params']['kernel'], axis=0).max():.6f}")


if __name__ == "__main__":
    main()
