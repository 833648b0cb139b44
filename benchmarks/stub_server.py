"""A server whose model takes a fixed time a batch, for what is the server's own: `stub_server.py GUARD MODEL MILLISECONDS`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rm_ood import OODGuard
from rm_ood.decision import Decisions
from rm_ood.reward_model import load_reward_model
from rm_ood.serve import logs
from rm_ood.serve.scorer import GuardScorer, Work
from rm_ood.serve.server import Server
from rm_ood.serve.settings import ServeSettings

BATCH = 2


class StubScorer(GuardScorer):
    """Tokenises, waits, and says that nothing could be scored."""

    seconds = 0.0

    def score(self, works: Sequence[Work]) -> Decisions:
        """See `Scorer`."""
        time.sleep(self.seconds)
        return self.failed(works, "non_finite")


def main() -> None:
    folder, model, milliseconds = sys.argv[1:]
    StubScorer.seconds = float(milliseconds) / 1000
    guard = OODGuard.from_pretrained(folder, *load_reward_model(model))
    logs.configure()
    # Small batches, so that a small machine can send three times what the stub can do; a queue of four, as by default.
    settings = ServeSettings(batch_size=BATCH, max_queue=4 * BATCH, max_items=4 * BATCH)
    Server(StubScorer(guard, BATCH), settings, port=0).serve_forever()


if __name__ == "__main__":
    main()
