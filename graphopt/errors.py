"""Every exception and warning that graphopt raises on purpose, each derived from the built-in type that fits."""


class GraphoptError(Exception):
    """Base of all graphopt errors: ``except graphopt.GraphoptError`` catches every one of them."""


class OptionError(GraphoptError, ValueError):
    """An option has a value, a name or a combination that means nothing."""


class PassError(GraphoptError, RuntimeError):
    """A pass failed or left an invalid graph behind; the graph that it was given is unchanged."""


class UnsupportedError(GraphoptError, NotImplementedError):
    """A trainable parameter is used in a way that a pass cannot serve; the text names each such use."""


class SampleAxisError(GraphoptError, ValueError):
    """The graph does not say which axis of its inputs counts the samples."""


class MissingAnnotation(GraphoptError, LookupError):
    """A parameter does not carry the annotation that was asked for."""


class StaleAnnotation(GraphoptError, RuntimeError):
    """``p.grad`` was changed in a way that its annotations cannot follow, so the pair no longer belongs together."""


class StoreError(GraphoptError, RuntimeError):
    """A store of weights cannot be opened, read, written or made durable; what was last committed is as it was."""


class StreamError(GraphoptError, RuntimeError):
    """A model whose layers are streamed was used in a way that its store cannot follow."""


class UncapturedParameter(UserWarning):
    """A parameter got a gradient outside any captured graph, so it has no statistics: the text names it."""


class UncapturedCall(UserWarning):
    """A call of a transformed model ran outside any captured graph: right results, but no pass had any effect."""


class InitError(GraphoptError, RuntimeError):
    """No initialisation can be learned from what the model computes: gradients that underflow, or are not finite."""


class MixedPrecisionInit(UserWarning):
    """An initialisation is learned under autocast, where second derivatives lose digits."""


class ModuleError(GraphoptError, RuntimeError):
    """An optimizer module is used in a way that its chain, or the model, does not allow; nothing was changed."""


class ClosureError(GraphoptError, RuntimeError):
    """A module of a chain needs a closure and was given none."""


class NonFiniteError(GraphoptError, FloatingPointError):
    """A gradient or a loss holds NaN or an infinity; nothing was changed."""
