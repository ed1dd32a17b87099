"""Reference rows: models so simple that they show what a metric's value is worth."""

from imlbench import AnyModel, hookimpl


@hookimpl
def imlbench_models() -> list[type[AnyModel]]:
    """Return the model classes."""
    from imlbench_reference import reference

    return [
        reference.ReferenceTrain,
        reference.ReferenceRecordings,
        reference.ReferenceKMeans,
        reference.ReferenceGMM,
    ]
