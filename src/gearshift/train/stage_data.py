"""From a recipe's sources to the loader of a stage."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from gearshift.errors import GearshiftError
from gearshift.train.data import open_source
from gearshift.train.distributed import Group
from gearshift.train.documents import Documents
from gearshift.train.packing import Encode, Layout, Loader, RowLane
from gearshift.train.recipe import Recipe, RecordStage, Stage
from gearshift.train.tokens import chat_encoder, text_encoder


class LayoutError(GearshiftError):
    """A stage's micro-batches do not go into the processes."""


class StageData:
    """The documents of all stages, opened once.

    Args:
        recipe: names them.
        tokenizer: of the supernet.

    Raises:
        DataError: documents are missing, empty, or of an unknown kind.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        opened: dict[str, Documents] = {}
        self.documents: list[list[Documents]] = []
        for index in range(len(recipe.stages)):
            for source in recipe.sources(index):
                if (key := source.model_dump_json(exclude={"weight", "column"})) not in opened:
                    opened[key] = open_source(source)
            keys = (s.model_dump_json(exclude={"weight", "column"}) for s in recipe.sources(index))
            self.documents.append([opened[key] for key in keys])

    @property
    def digests(self) -> list[str]:
        """What names the documents of each stage."""
        return [" ".join(documents.digest for documents in stage) for stage in self.documents]

    def check(self, group: Group) -> None:
        """Read the first step of every stage, so that broken data is refused before anything is written.

        Raises:
            DataError: documents are damaged, or too few.
        """
        for index in range(len(self.recipe.stages)):
            loader = self.loader(index, group)
            try:
                loader.next()
            finally:
                loader.close()

    def loader(self, index: int, group: Group) -> Loader:
        """The micro-batches of this process in a stage.

        Raises:
            LayoutError: they cannot be shared out evenly.
        """
        stage = self.recipe.stages[index]
        layout = layout_of(stage, group.rank, group.ranks)
        sources = self.recipe.sources(index)
        # A stage 'record' reads what the stage after it will train on.
        before = sum(not isinstance(earlier, RecordStage) for earlier in self.recipe.stages[:index])
        seed = (self.recipe.seed, before)
        whole = stage.stage == "sft"

        def make_lane(lane: int) -> RowLane:
            place = (lane, layout.rows)
            weights = [source.weight for source in sources]
            return RowLane(self.documents[index], weights, self._encoders(index), place, seed, whole)

        return Loader(layout, make_lane)

    def _encoders(self, index: int) -> list[Encode]:
        if self.recipe.stages[index].stage == "sft":
            make, column = chat_encoder, "messages"
        else:
            make, column = text_encoder, "text"
        return [make(self.tokenizer, source.column or column) for source in self.recipe.sources(index)]


def layout_of(stage: Stage, rank: int = 0, ranks: int = 1) -> Layout:
    """How a stage lays out its tokens.

    Raises:
        LayoutError: the micro-batches cannot be shared out evenly.
    """
    if stage.micro_batches % ranks:
        raise LayoutError(
            f"micro_batches is {stage.micro_batches} in the stage {stage.stage}, which {ranks} processes "
            f"cannot share evenly; give a multiple of {ranks}, and a smaller batch_size "
            "for as many tokens as before"
        )
    return Layout(
        stage.batch_size,
        stage.micro_batches,
        stage.sequence_length,
        stage.packing == "documents",
        rank,
        ranks,
    )
