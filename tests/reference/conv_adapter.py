"""Conv-Adapter, literally: seven nested sums. Chen et al., arXiv:2208.07463, section 3. Float64, no
project import."""

import numpy as np


def grouped_convolution(image, kernel, bias, groups, stride, padding, dilation):
    """image (c_in, H, W), kernel (c_out, c_in / groups, k, k) -> (c_out, H', W') by the definition
    of a convolution."""
    height, breadth = image.shape[1:]
    outputs, share, size, _ = kernel.shape
    rows = (height + 2 * padding - dilation * (size - 1) - 1) // stride + 1
    columns = (breadth + 2 * padding - dilation * (size - 1) - 1) // stride + 1
    out = np.zeros((outputs, rows, columns))
    for o in range(outputs):
        first = o // (outputs // groups) * share
        for r in range(rows):
            for c in range(columns):
                total = bias[o]
                for i in range(share):
                    for u in range(size):
                        for v in range(size):
                            y, x = (
                                r * stride - padding + u * dilation,
                                c * stride - padding + v * dilation,
                            )
                            if 0 <= y < height and 0 <= x < breadth:
                                total += kernel[o, i, u, v] * image[first + i, y, x]
                out[o, r, c] = total
    return out


def conv_adapter(
    image,
    host,
    depthwise,
    depthwise_bias,
    pointwise,
    pointwise_bias,
    scale,
    stride,
    padding,
    dilation,
):
    """h + alpha * W_up f(W_down (x) z) with h the output of the host convolution, f the ReLU, alpha
    one number per channel."""
    width = len(depthwise)
    code = np.maximum(
        grouped_convolution(image, depthwise, depthwise_bias, width, stride, padding, dilation), 0.0
    )
    delta = np.einsum("ow,whc->ohc", pointwise, code) + pointwise_bias[:, None, None]
    return host + scale[:, None, None] * delta
