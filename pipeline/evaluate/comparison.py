"""The page that sets one evaluation against another: what got better, what got worse, and what of it is chance."""

from itertools import chain
from pathlib import Path

from pipeline.config.sections import METRICS
from pipeline.config.values import differences
from pipeline.errors import UserError, shown
from pipeline.evaluate.charts import Axis
from pipeline.evaluate.diagnose import compare_found, diagnose
from pipeline.evaluate.evaluated import Evaluated
from pipeline.evaluate.overlay import Picture, Pictures
from pipeline.evaluate.page import MEANINGS, error_rows, facts, names_of, origin, present, subject, write_page

CHANGED = 6
"""Most images that are shown for the better, and for the worse."""


def write_comparison(path: Path, first: Evaluated, second: Evaluated) -> None:
    """Write the page of a second evaluation against a first.

    Raises:
        UserError: they are not of the same images, objects and categories, or there are no images.
    """
    truth, both = first.truth, (first, second)
    if (truth.document, truth.names) != (second.truth.document, second.truth.names):
        raise UserError(
            f"{shown(subject(first))} and {shown(subject(second))} were not scored on the same images and objects, and "
            "cannot be compared; evaluate both on one validation split"
        )
    comparison = compare_found(truth, first.found, second.found)
    diagnoses = [diagnose(truth, each.found, each.least_score) for each in both]
    before, after = (diagnosis.images for diagnosis in diagnoses)
    changes = {number: after[number].ap - before[number].ap for number in before.keys() & after.keys()}
    ranked = sorted(changes, key=lambda number: (-changes[number], number))
    better = [number for number in ranked if changes[number] > 0][:CHANGED]
    worse = [number for number in reversed(ranked) if changes[number] < 0][:CHANGED]
    makers = [Pictures(each, diagnosis, [*better, *worse]) for each, diagnosis in zip(both, diagnoses, strict=True)]

    def shown_pairs(numbers: list[int]) -> list[tuple[float, list[Picture]]]:
        pairs = ((changes[number], present(maker.whole(number) for maker in makers)) for number in numbers)
        return [(change, pictures) for change, pictures in pairs if pictures]

    names = names_of(truth)
    categories = [
        (names[number - 1], [each.metrics["per_category"][truth.names[number - 1]]["AP"] for each in both], difference)
        for number, difference in comparison.categories.items()
    ]
    ends = [abs(end) for row in categories for end in row[2][1:3]]
    ends += [abs(end) for difference in comparison.differences.values() for end in difference[1:3]]
    reach = max(ends, default=0.0) or 1.0
    origins = [dict(origin(each)) for each in both]
    content = {
        "title": f"{subject(second)} against {subject(first)}",
        "first": first,
        "second": second,
        "subjects": [subject(each) for each in both],
        "facts": facts(truth),
        "names": names,
        "comparison": comparison,
        "numbers": [
            (name, MEANINGS[name], [each.metrics[name] for each in both], comparison.differences[name])
            for name in METRICS
        ],
        "categories": sorted(categories, key=lambda row: -row[2].value),
        "reach": Axis("", -reach, reach),
        "errors": error_rows(*diagnoses),
        "better": shown_pairs(better),
        "worse": shown_pairs(worse),
        "least_score": second.least_score,
        "origin": [(key, [made.get(key, "-") for made in origins]) for key in dict.fromkeys(chain(*origins))],
        "settings": [shown(line, 400) for line in differences(first.config, second.config)],
    }
    write_page(path, "comparison.html", content)
