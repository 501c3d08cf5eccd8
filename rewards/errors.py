"""The error that means: a grader could not do its work, which says nothing about the completion."""


class RewardError(RuntimeError):
    """A reward could not be computed. A batch function may return one in the place of a completion's value."""
