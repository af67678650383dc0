"""Make the shipped base of a suite: ``python -m qpmerge_lite.companion.suites.pretrain vision``.

The encoder learns the suite's own pre-training task (to tell glyphs apart, to guess masked
characters); the head of that task is thrown away and the weights are written as half-precision
safetensors, with seed, steps, data hash and training figures in the header.
"""

import argparse
import hashlib
import importlib
import json

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .training import digest, schedule, write_weights

STEPS, BATCH, RATE, DECAY, WARMUP, EARLY = 6000, 128, 2e-3, 0.05, 1 / 30, 200


def pretrain(
    suite, seed=0, steps=STEPS, stop=None, progress=True, device="cpu"
) -> tuple[nn.Module, list[float], list[float]]:
    """Train the base of a suite module from scratch.

    Args:
        suite: module with ``build``, ``pretraining_data``, ``pretraining_head`` and
            ``pretraining_batch``.
        seed: of the weights, the order and the variations.
        steps: length of the schedule.
        stop: leave after so many steps of it.
        device: of the encoder; what it is shown is drawn on the CPU, the same everywhere.
    Returns: the encoder, and the loss and the accuracy of every batch.
    """
    torch.manual_seed(seed)
    encoder, generator = suite.build(), torch.Generator().manual_seed(seed)
    head = suite.pretraining_head(encoder.to(device)).to(device)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    losses, accuracies = [], []
    for step in tqdm(
        range(stop or steps), desc="pre-training", disable=not progress, mininterval=5
    ):
        optimiser.param_groups[0]["lr"] = RATE * schedule(step, steps, WARMUP)
        scores, labels = suite.pretraining_batch(encoder, head, generator, BATCH)
        loss = cross_entropy(scores, labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(loss.item())
        accuracies.append((scores.argmax(1) == labels).float().mean().item())
    return encoder, losses, accuracies


def header(
    suite, seed: int, steps: int, losses: list[float], accuracies: list[float]
) -> dict[str, str]:
    """What the weights' file says about its making."""
    return {
        "seed": str(seed),
        "steps": str(steps),
        "data_sha256": digest(*suite.pretraining_data()),
        "early_loss": f"{sum(losses[EARLY - 50 : EARLY]) / 50:.6f}",
        "train_accuracy": f"{sum(accuracies[-100:]) / len(accuracies[-100:]):.6f}",
        "torch": torch.__version__.split("+")[0],
    }


def main() -> None:
    """Pre-train, write the weights and print the fields that the manifest holds about them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    suite = importlib.import_module(f"qpmerge_lite.companion.suites.{options.suite}")
    encoder, losses, accuracies = pretrain(
        suite, options.seed, options.steps, device=options.device
    )
    metadata = header(suite, options.seed, options.steps, losses, accuracies)
    half = {name: value.half() for name, value in encoder.state_dict().items()}
    write_weights(half, suite.WEIGHTS, metadata)
    content = suite.WEIGHTS.read_bytes()
    print(
        json.dumps(
            {
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
                "made": metadata,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
