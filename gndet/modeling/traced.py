"""Rewrite a network that knows nothing of padding so that each picture of a padded batch is computed as if alone.

The network is traced (torch.fx), and a picture of one size is run through it to learn the stride of each map.  Then
    - norms get the area of the pictures on their map, and take their statistics there;
    - a map is cleared in the padding before a layer that reads neighboring cells, unless it is zero there already;
    - poolings, also those over the whole map (squeeze-and-excitation), see the pictures' cells alone;
    - strided layers round the side of a map up, as a ResNet's do, so that a picture has ceil(side / stride) cells.
What this file does not know is left as it is, after its input has been cleared; `timm_backbone.py` tests the whole.
B images, C channels, (H, W) maps.
"""

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import Argument

from gndet.modeling.norms.valid_area import ValidArea
from gndet.modeling.pooling import Window, average_pool, global_mean, max_pool

SIDES = (96, 160)  # of the picture [pixels]; no height of its maps at any stride is one of their widths
STRIDES = (1, 2, 4, 8, 16, 32)
PLACES: dict[tuple[int, ...], int] = {(SIDES[0] // stride, SIDES[1] // stride): stride for stride in STRIDES}
# what maps zeros to zeros cell by cell: functions and methods
ZERO_KEEPING: set[Any] = {
    F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.hardtanh, F.leaky_relu, F.elu, F.mish, F.dropout, torch.relu,
    torch.cat, torch.concat, torch.chunk, torch.split, operator.getitem,
    "relu", "relu_", "contiguous", "permute", "chunk", "split",
}  # fmt: skip
ACTIVATIONS = {  # modules of torch and timm that map zeros to zeros number by number
    "Identity", "Dropout", "ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "CELU", "SELU", "SiLU", "Swish", "GELU",
    "GELUTanh", "QuickGELU", "Mish", "HardMish", "Hardswish", "HardSwish", "Hardtanh", "Tanh",
}  # fmt: skip
SUMS: set[Any] = {operator.add, operator.iadd, operator.sub, torch.add, torch.sub, "add", "add_", "sub"}
PRODUCTS: set[Any] = {operator.mul, operator.imul, torch.mul, operator.truediv, "mul", "mul_", "div"}
NO_VALUES: set[Any] = {getattr, "size", "dim"}  # they read a map's shape


class NormAct(nn.Module):
    """A norm of gndet's and the activation that followed the norm that it replaces."""

    def __init__(self, norm: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.act = norm, act

    def forward(self, x: Tensor, area: ValidArea | None = None) -> Tensor:
        """Normalize and activate maps x (B, C, H, W); area: of the pictures."""
        return self.act(self.norm(x, area))


class Place(NamedTuple):
    """Where a tensor holds a map of the picture."""

    stride: int
    axis: int  # the height's; the width's is the next one


class Program(NamedTuple):
    """A rewritten network: functions that run one after the other, and the layers that they run."""

    segments: list[Callable[[nn.Module, Tensor, Any], tuple[Tensor, ...]]]  # (net, x, areas): the next x, features
    layers: dict[str, int]  # names of the modules and parameters that are used: 1 in the stem, 2..5 up to C2..C5
    rectified: list[str]  # names of the modules on maps that end with ReLU
    channels: tuple[int, ...]  # of C2..C5


def cleared(x: Tensor, area: ValidArea | None, axis: int) -> Tensor:
    """Set the padding of x to zero; axis: the height's."""
    if area is None:
        return x
    mask = area.mask[:, 0]  # (B, H, W)
    return torch.where(mask[(slice(None), *[None] * (axis - 1), ..., *[None] * (x.dim() - axis - 2))], x, 0.0)


def extended(x: Tensor, window: Window) -> Tensor:
    """Append the cells that maps x (B, C, H, W) lack."""
    return window.extend(x)


class Tracer(fx.Tracer):
    """Trace a network down to its layers; note the result of every module in `results`, by name."""

    def __init__(self, is_leaf: Callable[[nn.Module], bool], functions: Iterable[Callable[..., Any]]) -> None:
        super().__init__(autowrap_functions=tuple(functions))
        self.is_leaf, self.results = is_leaf, dict[str, Any]()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layer = isinstance(m, NormAct | nn.Conv2d | nn.LayerNorm) or self.is_leaf(m)
        return layer or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        self.results[self.path_of_module(m)] = result
        return result


def rewrite(net: nn.Module, tracer: Tracer, features: list[str], masked: bool) -> Program:
    """Trace a network whose norms are NormAct, and rewrite it.

    features: names of the modules that return C2..C5.  masked: whether padding is kept out; without, only the sides of
    maps are rounded up.  Raises KeyError if a feature is no module's result, and what tracing raises.
    """
    graph = tracer.trace(net)
    results = {name: proxy.node for name, proxy in tracer.results.items() if isinstance(proxy, fx.Proxy)}
    ends = [results[name] for name in results if list(net.get_submodule(name).children())]
    writer = _Rewriter(net, graph, masked)
    writer.run()
    outputs = [writer.clear(writer.current(results[name])) for name in features]
    return _program(writer, outputs, set(map(writer.current, ends)))


class _Shapes(fx.Interpreter):
    """Run a graph and note the shape of every tensor."""

    def __init__(self, net: nn.Module, graph: fx.Graph) -> None:
        super().__init__(net, graph=graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Skip norms, which keep the shape and do not run on the meta device."""
        is_norm = isinstance(self.fetch_attr(target), NormAct)
        return args[0] if is_norm else super().call_module(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


class _Rewriter:
    """Rewrite a graph node by node, and know of each map whether its padding is zero."""

    def __init__(self, net: nn.Module, graph: fx.Graph, masked: bool) -> None:
        self.net, self.graph, self.masked = net, graph, masked
        self.modules = dict(net.named_modules())
        self.x = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(self.x):
            self.areas = graph.placeholder("areas", default_value=None)
        self.shapes = self._shapes()
        self.clean = {self.x}
        self.replaced: dict[fx.Node, fx.Node] = {}  # by poolings that know areas, or by the same map cleared

    def _shapes(self) -> dict[fx.Node, tuple[int, ...]]:
        modes = [(module, module.training) for module in self.net.modules()]
        interpreter = _Shapes(self.net.eval(), self.graph)
        with torch.no_grad():
            interpreter.run(torch.zeros(1, 3, *SIDES, device=next(self.net.parameters()).device))
        for module, training in modes:
            module.training = training
        return interpreter.shapes

    def place(self, node: Argument) -> Place | None:
        """Return where a node holds a map; None if it does not."""
        shape = self.shapes.get(node, ()) if isinstance(node, fx.Node) else ()
        found = ((axis, PLACES.get(shape[axis : axis + 2])) for axis in range(1, len(shape) - 1))
        return next((Place(stride, axis) for axis, stride in found if stride), None)

    def run(self) -> None:
        """Rewrite all nodes."""
        for node in list(self.graph.nodes):
            if node.op == "call_module":
                self._module(node, self.modules[str(node.target)])
            elif node.op in ("call_function", "call_method"):
                self._function(node)

    def current(self, node: fx.Node) -> fx.Node:
        """Return the node that stands for a node of the traced graph."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def clear(self, node: fx.Node) -> fx.Node:
        """Return a node with the same map, zero in the padding, which every user of the node gets."""
        place = self.place(node)
        if not self.masked or place is None or node in self.clean:
            return node
        with self.graph.inserting_after(node):
            area = self.graph.call_function(operator.getitem, (self.areas, place.stride))
        with self.graph.inserting_after(area):
            new = self.graph.call_function(cleared, (node, area, place.axis))
        self._substitute(node, new)
        return new

    def _substitute(self, node: fx.Node, new: fx.Node) -> None:
        """Let all users of a node take a new node instead, whose map is clean."""
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.shapes[new], self.replaced[node] = self.shapes[node], new
        if self.place(new):
            self.clean.add(new)

    def _clear_inputs(self, node: fx.Node) -> None:
        for argument in node.all_input_nodes:
            self.clear(argument)

    def _area(self, node: Argument, before: fx.Node) -> fx.Node | None:
        place = self.place(node)
        if not self.masked or place is None:
            return None
        with self.graph.inserting_before(before):
            return self.graph.call_function(operator.getitem, (self.areas, place.stride))

    def _replace(self, node: fx.Node, function: Callable[..., Tensor], *args: Any, **options: Any) -> None:
        with self.graph.inserting_before(node):
            self._substitute(node, self.graph.call_function(function, args, options))

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        """Rewrite the call of a module."""
        x, place, before = node.args[0], self.place(node), self.place(node.args[0])
        if isinstance(module, NormAct):
            node.args = (x, self._area(node, node))
            if place and self.masked and _keeps_zero(module.act):
                self.clean.add(node)
        elif isinstance(module, nn.Conv2d):
            self._conv(node, module)
        elif type(module) in (nn.MaxPool2d, nn.AvgPool2d) and place and before and getattr(module, "dilation", 1) == 1:
            window, areas = _window(module), (self._area(x, node), self._area(node, node))
            if isinstance(module, nn.MaxPool2d):
                self._replace(node, max_pool, x, window, *areas)
            else:
                border = module.count_include_pad and any(window.padding)
                self._replace(node, average_pool, x, window, *areas, counts_border=border)
        elif isinstance(module, nn.AdaptiveAvgPool2d) and before and self.shapes[node][2:] == (1, 1):
            self._replace(node, global_mean, x, self._area(x, node), keepdim=True)
        elif place and place == before and _is_activation(module):
            if x in self.clean and _keeps_zero(module):
                self.clean.add(node)
        elif not isinstance(module, nn.LayerNorm | nn.Linear):  # of the channels of one cell
            self._clear_inputs(node)

    def _conv(self, node: fx.Node, conv: nn.Conv2d) -> None:
        window, x = _window(conv), node.args[0]
        if window.kernel != (1, 1):
            self._clear_inputs(node)
        elif x in self.clean and conv.bias is None:
            self.clean.add(node)
        lacking = any(window.missing(size, axis) for size in range(32, 64) for axis in (0, 1))
        if lacking and self.place(x) and self.place(node) and "Same" not in type(conv).__name__:
            with self.graph.inserting_before(node):
                longer = self.graph.call_function(extended, (node.args[0], window))
            node.args = (longer,)

    def _function(self, node: fx.Node) -> None:
        """Rewrite the call of a function or method."""
        target, inputs = node.target, [each for each in node.all_input_nodes if self.place(each) or each in self.clean]
        if not inputs or target in NO_VALUES:
            return
        place, same = self.place(node), all(self.place(each) == self.place(node) for each in inputs)
        if self._is_mean(node):
            keepdim = len(self.shapes[node]) == 4
            self._replace(node, global_mean, inputs[0], self._area(inputs[0], node), keepdim=keepdim)
        elif target in ZERO_KEEPING and (same or target in (torch.chunk, torch.split, operator.getitem, "permute")):
            pass
        elif not (place and same and target in SUMS | PRODUCTS):
            self._clear_inputs(node)
            return
        clean = [each in self.clean for each in inputs]
        whole = len(inputs) == sum(isinstance(each, fx.Node) for each in node.args)
        if any(clean) if target in PRODUCTS else all(clean) and (whole or target not in SUMS):
            self.clean.add(node)

    def _is_mean(self, node: fx.Node) -> bool:
        """Return whether a node is the mean of maps (B, C, H, W) over H and W."""
        before = self.place(node.args[0]) if node.args else None
        if before is None or before.axis != 2 or len(self.shapes[node.args[0]]) != 4:  # type: ignore[index]
            return False
        if node.target is F.adaptive_avg_pool2d:
            return self.shapes[node][2:] == (1, 1)
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return node.target in ("mean", torch.mean) and dims in ((2, 3), [2, 3], (-2, -1), [-2, -1])


def _window(layer: Any) -> Window:
    """Return the window of a convolution or pooling layer, dilation included."""
    pairs = [value if isinstance(value, tuple) else (value, value)
             for value in (layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1))]  # fmt: skip
    if isinstance(layer.padding, str):
        pairs[2] = (0, 0) if layer.padding == "valid" else tuple((side - 1) // 2 for side in pairs[0])
    kernel, stride, padding, dilation = pairs
    height, width = ((side - 1) * step + 1 for side, step in zip(kernel, dilation, strict=True))
    return Window((height, width), stride, padding)


def _is_activation(module: nn.Module) -> bool:
    """Return whether a module works number by number."""
    return type(module).__name__ in (*ACTIVATIONS, "Sigmoid", "Hardsigmoid", "HardSigmoid", "Softplus")


def _keeps_zero(module: nn.Module) -> bool:
    """Return whether a module that works number by number maps 0 to 0."""
    parts = module.children() if isinstance(module, nn.Sequential) else (module,)
    return all(type(part).__name__ in ACTIVATIONS for part in parts)


def _program(writer: _Rewriter, outputs: list[fx.Node], ends: set[fx.Node]) -> Program:
    """Cut a rewritten graph into segments with one tensor between them, at results of `ends`, and compile them."""
    graph, net = writer.graph, writer.net
    for node in graph.nodes:
        if node.op == "output":
            node.args = (tuple(outputs),)
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)
    graph.lint()
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    number = {node: i for i, node in enumerate(graph.nodes)}
    segments, part, entry = [], [], writer.x
    for node in nodes:
        part.append(node)
        alive = [each for each in (entry, *part) if any(number[user] > number[node] and user.op != "output"
                                                        for user in each.users)]  # fmt: skip
        if node is nodes[-1] or (alive == [node] and (node in ends or node in outputs)):
            segments.append(_function_of(net, entry, writer.areas, part, [each for each in part if each in outputs]))
            entry, part = node, []
    layers = _layers(writer, nodes, outputs)
    rectified = [str(node.target) for node in nodes if node.op == "call_module" and writer.place(node)
                 and _ends_with_relu(writer.modules[str(node.target)])]  # fmt: skip
    return Program(segments, layers, rectified, tuple(writer.shapes[node][1] for node in outputs))


def _layers(writer: _Rewriter, nodes: list[fx.Node], outputs: list[fx.Node]) -> dict[str, int]:
    """Return the modules and parameters that the nodes use: 1 before the first map of stride 4, 2..5 up to C2..C5."""
    layers: dict[str, int] = {}
    level = 1
    for node in nodes:
        place = writer.place(node)
        if level == 1 and place and place.stride >= 4:
            level = 2
        if node.op in ("call_module", "get_attr"):
            layers.setdefault(str(node.target), level)
        if node in outputs:
            level = max(level, outputs.index(node) + 3)
    return {name: min(level, 5) for name, level in layers.items()}


def _ends_with_relu(module: nn.Module) -> bool:
    return isinstance(module.act if isinstance(module, NormAct) else module, nn.ReLU)


def _function_of(
    net: nn.Module, entry: fx.Node, areas: fx.Node, nodes: list[fx.Node], outputs: list[fx.Node]
) -> Callable[[nn.Module, Tensor, Any], tuple[Tensor, ...]]:
    """Compile nodes as a function (net, the value of entry, areas) that returns the last value, then the outputs."""
    graph = fx.Graph()
    copies = {entry: graph.placeholder("x"), areas: graph.placeholder("areas")}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output((copies[nodes[-1]], *(copies[node] for node in outputs)))
    return type(fx.GraphModule(net, graph)).forward
