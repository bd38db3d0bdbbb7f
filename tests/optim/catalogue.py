"""The rows of the optimizer catalogue, and which of the public names each is about.

A test that carries out the acceptance test of a row says so, and `test_catalogue` looks whether each row has one::

    @accepts("O2")
    def test_shampoo_follows_the_paper(): ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_F = TypeVar("_F", bound=Callable[..., object])


def accepts(*rows: str) -> Callable[[_F], _F]:
    """Mark a test as the acceptance test, or a part of it, of rows of `ROWS`."""
    unknown = set(rows) - set(ROWS)
    if unknown:
        raise ValueError(f"no rows {sorted(unknown)} in tests/optim/catalogue.py")

    def mark(test: _F) -> _F:
        test.accepts = (*getattr(test, "accepts", ()), *rows)  # type: ignore[attr-defined]
        return test

    return mark


# By the numbers of the catalogue; "+" is what it does not have.
ROWS: dict[str, str] = {
    # Core
    "C11": "",
    # Optimizers
    "O1": "Adam",
    "O2": "Shampoo",
    "O3": "SOAP",
    "O4": "Muon",
    "O5": "SophiaH",
    "O6": "Adagrad",
    "O7": "FullMatrixAdagrad",
    "O8": "Lion",
    "O9": "RMSprop",
    "O10": "OrthoGrad",
    "O11": "Rprop",
    "O12": "ScaleLRBySignChange BacktrackOnSignChange SignConsistencyMask SignConsistencyLRs",
    "O13": "Orthogonalize DualNormCorrection MuonAdjustLR",
    "K1": "",
    "K2": "",
    "K3": "",
    "K4": "",
    "K5": "",
    "K6": "",
    "A1": "",
    "A2": "",
    "A3": "",
    "A4": "",
    "A5": "",
    "O+torch": "Adadelta Adafactor Adamax ASGD LARS NAdam RAdam",
    "O+Adan": "Adan",
    "O+MARS": "MARSCorrection",
    "O+PSGD": "PSGDKron",
    "O+ScheduleFree": "ScheduleFree",
    "O+Prodigy": "Prodigy",
    # Momentum
    "M1": "NAG",
    "M2": "HeavyBall",
    "M3": "EMA",
    "M4": "Averaging",
    "M5": "MedianAveraging",
    "M6": "WeightedAveraging",
    "M7": "Cautious",
    "M8": "ScaleByGradCosineSimilarity",
    "M9": "MatrixMomentum",
    "M10": "AdaptiveMatrixMomentum",
    "M11": "IntermoduleCautious ScaleModulesByCosineSimilarity UpdateGradientSignConsistency",
    "M12": "EMASquared SqrtEMASquared Debias Debias2 CenteredEMASquared CenteredSqrtEMASquared",
    # Stabilization
    "S1": "ClipNorm",
    "S2": "ClipValue",
    "S3": "Normalize",
    "S4": "Centralize",
    "S5": "ClipNormByEMA",
    "S6": "NormalizeByEMA",
    "S7": "ClipValueByEMA",
    "S8": "ClipNormGrowth",
    "S9": "ClipValueGrowth",
    # Gradient approximations
    "G1": "FDM",
    "G2": "RandomizedFDM",
    "G3": "SPSA",
    "G4": "RDSA",
    "G5": "MeZO",
    "G6": "GaussianSmoothing",
    "G7": "ForwardGradient",
    "G8": "",
    # Second order
    "N1": "Newton",
    "N2": "NewtonCG",
    "N3": "NystromSketchAndSolve",
    "N4": "NystromPCG",
    "N5": "HigherOrderNewton",
    "N+cubic": "CubicRegularization",
    "N+GaussNewton": "GaussNewton LevenbergMarquardt",
    # Quasi-Newton
    "Q1": "BFGS",
    "Q2": "DFP",
    "Q3": "SR1",
    "Q4": "FletcherVMM",
    "Q5": "Horisho",
    "Q6": "GradientCorrection",
    "Q7": "SSVM",
    "Q8": "PSB",
    "Q9": "BroydenGood",
    "Q10": "BroydenBad",
    "Q11": "Greenstadt1",
    "Q12": "Greenstadt2",
    "Q13": "ColumnUpdatingMethod",
    "Q14": "ThomasOptimalMethod",
    "Q15": "McCormick",
    "Q16": "Pearson",
    "Q17": "ProjectedNewtonRaphson",
    "Q18": "LBFGS",
    "Q19": "LSR1",
    "Q20": "OnlineLBFGS",
    # Conjugate gradient
    "J1": "PolakRibiere",
    "J2": "FletcherReeves",
    "J3": "HestenesStiefel",
    "J4": "DaiYuan",
    "J5": "LiuStorey",
    "J6": "ConjugateDescent",
    "J7": "HagerZhang",
    "J8": "HybridHS_DY",
    "J9": "ProjectedGradientMethod",
    # Line search
    "L1": "Backtracking",
    "L2": "AdaptiveBacktracking",
    "L3": "StrongWolfe",
    "L4": "ScipyMinimizeScalar",
    "L5": "TrustRegion",
    "L6": "GridLineSearch",
    # Step size
    "R1": "LR",
    "R2": "PolyakStepSize",
    "R3": "Warmup",
    "R4": "StepSize RandomStepSize",
    "R+BB": "BarzilaiBorwein",
    # Projections
    "P1": "FFTProjection",
    "P2": "DCTProjection",
    "P3": "VectorProjection",
    "P4": "TensorizeProjection",
    "P5": "BlockPartition",
    "P6": "TensorNormsProjection",
    "P7": "GaLore",
    # Smoothing, weight decay, wrap
    "H1": "LaplacianSmoothing",
    "H2": "GaussianHomotopy",
    "H+SAM": "SAM ASAM",
    "W1": "WeightDecay",
    "W2": "DirectWeightDecay",
    "W3": "Wrap",
    "W+cautious": "CautiousWeightDecay",
    # Ops and combinators
    "X1": "Add Sub RSub Mul Div RDiv Pow RPow Lerp Maximum Minimum CopySign RCopySign CopyMagnitude Clip MirroredClip Threshold",
    "X2": "Graft GraftInputToOutput GraftOutputToInput RGraft GraftToUpdate GraftModules GraftToGrad GraftGradToUpdate GraftToParams",
    "X3": "GramSchimdt",
    "X4": "SubModules DivModules PowModules LerpModules ClipModules Where",
    "X5": "Sum Mean Prod WeightedSum WeightedMean Median MaximumModules MinimumModules",
    "X6": "Abs Sign Exp Sqrt Reciprocal Negate NanToNum Rescale UnaryLambda UnaryParameterwiseLambda CustomUnaryOperation",
    "X7": "Clone Grad Params Update Zeros Ones Fill RandomSample Randn Uniform GradToNone UpdateToNone Identity NoOp",
    "X8": "AccumulateSum AccumulateMean AccumulateProduct AccumulateMaximum AccumulateMinimum",
    "X9": "Previous LastDifference LastGradDifference LastProduct LastRatio LastAbsoluteRatio",
    "X10": "GradSign UpdateSign Relative NoiseSign Dropout WeightDropout FillLoss MulByLoss DivByLoss NegateOnLossIncrease",
    "X11": "GradientAccumulation",
    "X12": "Multistep Sequential",
    "X13": "Split Alternate Switch",
    "X14": "PrintUpdate PrintShape",
    "X+": "Masked Freeze",
    # TrueGrad
    "T5": "TrueGradAdam",
    "T9": "TrueGradLaProp",
    "T10": "TrueGradRMSprop",
    "T+": "TrueGradShampoo",
    # Wrappers with the interface of torch.optim; public names of graphopt.optim.wrappers
    "E1": "ScipyMinimize",
    "E2": "NLOptOptimizer",
    "E3": "NevergradOptimizer",
    "E4": "ScipyRootOptimization ScipyDE ScipyDualAnnealing SplitOptimizers",
    "E+": "AskTellOptimizer",
}
