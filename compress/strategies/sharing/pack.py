"""How the packed file is written: by the entropy coder of a paper, or the best there is.

Source: Han et al., Deep Compression (arXiv 1510.00149, section 4), for Huffman codes; Duda (arXiv 1311.2540) for ANS.
"""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from compress.candidate import Candidate, Coder
from compress.graph.rewrite import copy_model
from compress.strategies.strategy import STRICT, Context, Strategy


@dataclass(frozen=True, config=STRICT)
class Pack(Strategy):
    """Choose the coder of the packed file; no weight changes.

    Args:
        coder: ``ans`` (asymmetric numeral systems), ``huffman``, ``smallest`` (for each stream the better of the two),
            or ``none``: all symbols of a stream have the same number of bits.
    """

    coder: Coder = "smallest"

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        """Note the choice; the file is written when the stage is measured."""
        return candidate.evolve(model=copy_model(candidate.model), coder=self.coder)
