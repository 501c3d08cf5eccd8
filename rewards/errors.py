"""The error of a grader that could not do its work, which says nothing about the completion."""


class RewardError(RuntimeError):
    """A reward could not be computed. A batch function may return one as the value of a completion."""
