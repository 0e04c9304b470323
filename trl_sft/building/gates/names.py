"""The gate `names`: names of people, by presidio with a model of spaCy that the user chooses.

In: a row. Out: how many names it holds; the names themselves are not repeated. Only names of two words or more count: a
first name says nothing of a person, and exercises are full of them. A model does not know famous or invented people
from others, so that `audit` notes such rows and does not remove them. Not here: addresses and numbers
(`personal_data`), and postal addresses, which presidio has no recogniser for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates.row_text import join_texts

PACKAGES = ("presidio_analyzer", "spacy")
_ENTITY = "PERSON"
_LEAST_WORDS = 2
_LEAST_SCORE = 0.5  # a name by a model of spaCy has 0.85


class NamesGate:
    """Notes rows with names of people."""

    name = "names"

    def __init__(self, find_names: Callable[[str], list[str]]) -> None:
        """Take the function that returns the names in a text."""
        self._find_names = find_names

    def check(self, row: CandidateRow) -> Rejection | None:
        """Search all turns."""
        names = {" ".join(name.split()) for name in self._find_names(join_texts(row))}
        full = [name for name in names if len(name.split()) >= _LEAST_WORDS]
        if not full:
            return None
        number = "the name of a person" if len(full) == 1 else f"{len(full)} names of people"
        return Rejection(self.name, f"the row holds {number}")


def has_model(model: str) -> bool:
    """Tell whether spaCy has a model: a package that is installed, or a folder. presidio would download another one."""
    from spacy import util

    return util.is_package(model) or Path(model).is_dir()


def make_finder(model: str) -> Callable[[str], list[str]]:
    """Return a function that returns the names of people in a text.

    Args:
        model: a package of spaCy that is installed, such as en_core_web_sm, or a folder with a pipeline.

    Raises:
        OSError: spaCy cannot read the model.

    """
    import spacy
    from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
    from presidio_analyzer.nlp_engine import SpacyNlpEngine
    from presidio_analyzer.predefined_recognizers import SpacyRecognizer

    pipeline = spacy.load(model)
    language = str(pipeline.meta["lang"])
    engine = SpacyNlpEngine(models=[{"lang_code": language, "model_name": model}])
    engine.nlp = {language: pipeline}
    recognizer = SpacyRecognizer(supported_language=language, supported_entities=[_ENTITY])
    registry = RecognizerRegistry(recognizers=[recognizer], supported_languages=[language])
    analyzer = AnalyzerEngine(nlp_engine=engine, registry=registry, supported_languages=[language])

    def find_names(text: str) -> list[str]:
        found = analyzer.analyze(text, language=language, entities=[_ENTITY], score_threshold=_LEAST_SCORE)
        return [text[entity.start : entity.end] for entity in found]

    return find_names
