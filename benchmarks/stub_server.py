"""A server whose model takes a fixed time a batch, and one an item: `stub_server.py GUARD MODEL MS MS [SETTING=NUMBER ...]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from rm_ood import OODGuard
from rm_ood.decision import Decisions
from rm_ood.reward_model import load_reward_model
from rm_ood.serve import logs
from rm_ood.serve.scorer import GuardScorer, Work
from rm_ood.serve.server import Server
from rm_ood.serve.settings import ServeSettings

BATCH = 4
# Less than twice what the slowest hundredth takes at half the load: the batch in the model, and two that wait.
MAX_WAIT_S = 0.08


class StubScorer(GuardScorer):
    """Tokenises, waits, and says that nothing could be scored."""

    seconds = 0.0
    item_seconds = 0.0

    def score(self, works: Sequence[Work]) -> Decisions:
        """See `Scorer`."""
        time.sleep(self.seconds + self.item_seconds * len(works))
        return self.failed(works, "non_finite")


def main() -> None:
    folder, model, batch_ms, item_ms, *options = sys.argv[1:]
    StubScorer.seconds, StubScorer.item_seconds = float(batch_ms) / 1000, float(item_ms) / 1000
    guard = OODGuard.from_pretrained(folder, *load_reward_model(model))
    logs.configure()
    # Small batches, so that a small machine can send three times what the stub can do.
    settings = ServeSettings(batch_size=BATCH, max_wait_s=MAX_WAIT_S)
    for name, _, value in (option.partition("=") for option in options):
        settings = replace(settings, **{name: type(getattr(settings, name))(value)})
    Server(StubScorer(guard, BATCH), settings, port=0).serve_forever()


if __name__ == "__main__":
    main()
