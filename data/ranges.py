"""Types of the numbers in a recipe: each says which values make sense, for `data.options.check_type`.

They hold for our keys and for those of TRL, PEFT and bitsandbytes. The upper ends are far above any use; they catch a
slip such as `1e30` before it becomes a NaN or an allocation that fails.
"""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt
from pydantic import FiniteFloat

# A number of steps, rows, tokens or processes.
Count = Annotated[int, Ge(1), Le(10**9)]
CountOrZero = Annotated[int, Ge(0), Le(10**9)]
# Seeds of Python, NumPy and torch: NumPy's are the smallest.
Seed = Annotated[int, Ge(0), Lt(2**32)]
# Seconds; a longer wait overflows the clocks of threads and sockets.
Seconds = Annotated[FiniteFloat, Gt(0), Le(10**7)]
# A factor of a reward, of a penalty or of a term of the loss.
Weight = Annotated[FiniteFloat, Ge(0), Le(10**6)]
PositiveWeight = Annotated[FiniteFloat, Gt(0), Le(10**6)]
SignedWeight = Annotated[FiniteFloat, Ge(-(10**6)), Le(10**6)]
Fraction = Annotated[FiniteFloat, Ge(0), Le(1)]
PositiveFraction = Annotated[FiniteFloat, Gt(0), Le(1)]
FractionBelowOne = Annotated[FiniteFloat, Ge(0), Lt(1)]
# An optimizer's rate: AdamW moves each weight by about this much per step.
LearningRate = Annotated[FiniteFloat, Ge(0), Le(1)]
# Logits are divided by it: below 0.01 they overflow, above 100 every token is equally likely.
Temperature = Annotated[FiniteFloat, Ge(0.01), Le(100)]
Zero = Annotated[FiniteFloat, Ge(0), Le(0)]
# transformers' intervals: a number of steps, or a fraction of the whole run.
Interval = Count | Annotated[FiniteFloat, Gt(0), Lt(1)]
IntervalOrZero = CountOrZero | Annotated[FiniteFloat, Gt(0), Lt(1)]
