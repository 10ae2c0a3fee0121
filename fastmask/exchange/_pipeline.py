# Copyright The fastmask authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""Sampling in plain PyTorch: the diffusion process that the network was trained with, and a Heun sampler with guidance.

A process mixes an image with unit noise at a time t, a(t) image + b(t) noise, and denoises with the network F:
D = c_skip x + c_out F(c_in x; c_noise).
"""

import itertools
import math

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


def _spaced(high, low, num_steps, rho=7.0):
    """Noise levels from high to low (arXiv 2206.00364, equation 5), and 0."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


class EDM:
    """a = 1, b = t (arXiv 2206.00364, table 1)."""

    def __init__(self, sigma_data, **training):
        self.data = sigma_data**2

    def times(self, num_steps):
        """Return decreasing times that end at 0."""
        return _spaced(80.0, 0.002, num_steps)

    def first(self, t):
        """Return b at the first time."""
        return t

    def coefficients(self, t):
        """Return c_in, c_noise, c_skip and c_out."""
        total = t.square() + self.data
        return total.rsqrt(), t.log() / 4, self.data / total, t * (self.data / total).sqrt()

    def slope(self, x, denoised, t):
        """Return dx/dt of the probability flow ODE."""
        return (x - denoised) / t


class Flow(EDM):
    """a = 1 - t, b = t; F is the velocity, noise - image (arXiv 2209.03003)."""

    def __init__(self, shift, **training):
        self.shift = shift

    def times(self, num_steps):
        """Return even times, shifted toward noise."""
        t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def coefficients(self, t):
        """Return those of D = x - t F."""
        return torch.ones_like(t), t, torch.ones_like(t), -t


class VP:
    """a^2 = 1 / (1 + t^2) = alpha_bar of DDPM's thousand steps, b = t a; F is the noise (arXiv 2006.11239)."""

    def __init__(self):
        self.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        self.decay = -torch.log1p(-self.betas).cumsum(0)  # -ln(alpha_bar)

    def times(self, num_steps):
        """Return the levels of timesteps 999 to 0, and 0."""
        low, high = self.decay[[0, -1]].expm1().sqrt().tolist()
        return _spaced(high, low, num_steps)

    def first(self, t):
        """Return b at the first time."""
        return t / (1 + t.square()).sqrt()

    def timestep(self, t):
        """Return the timestep of a level: the inverse of the sum -ln(alpha_bar) by the Euler-Maclaurin formula."""
        first, slope = 1e-4, (0.02 - 1e-4) / 999
        decay = t.double().square().log1p()
        linear = first + slope / 2
        k = ((linear**2 + 2 * slope * (decay - first).clamp(min=0)).sqrt() - linear) / slope
        for _ in range(3):  # Newton's method
            beta = first + slope * k
            log, log1 = torch.log1p(-beta), math.log1p(-first)
            integral = (beta + (1 - beta) * log - (first + (1 - first) * log1)) / slope
            value = integral - (log + log1) / 2 + (slope / (1 - beta) - slope / (1 - first)) / 12
            k = k - (value - decay) / (-log + slope / (1 - beta) / 2)
        return k.clamp(0, 999)

    def coefficients(self, t):
        """Return those of D = (x - b F) / a."""
        return torch.ones_like(t), self.timestep(t).to(t.dtype), (1 + t.square()).sqrt(), -t

    def slope(self, x, denoised, t):
        """Return a^3 (noise - t D)."""
        a = (1 + t.square()).rsqrt()
        return a**3 * ((x - a * denoised) / (t * a) - t * denoised)


PROCESSES = {"edm": EDM, "flow": Flow, "vp": VP}


class MaskDiTPipeline(DiffusionPipeline):
    """Draws images of a class, or of none.

    Args:
        transformer: the network.
        vae: decodes latents; None loads ``vae_name`` when it is needed.
        process: name and numbers of the diffusion process.
        latents: scale and shift of the latents, (latent - shift) * scale; empty for those of the VAE; None for pixels.
        vae_name: name of the VAE on the hub, or its folder.
        id2label: names of the classes by number.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(self, transformer, vae=None, process=None, latents=None, vae_name=None, id2label=None):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(process=process, latents=latents, vae_name=vae_name, id2label=id2label)
        numbers = dict(process)
        self.process = PROCESSES[numbers.pop("name")](**numbers)
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels=None,
        num_images=1,
        num_inference_steps=40,
        guidance_scale=1.5,
        generator=None,
        latents=None,
        output_type="pil",
        return_dict=True,
    ):
        """Draw images.

        Args:
            class_labels: a class, or one per image, by number or name; None draws ``num_images`` without a class.
            num_images: number of images without a class.
            num_inference_steps: number of steps; each takes two evaluations of the network, the last one.
            guidance_scale: scale of classifier-free guidance; 1 disables it.
            generator: generator of the noise.
            latents: the noise itself, of the shape of the samples.
            output_type: "pil", "np", "pt" (in [0, 1]), or "latent" (the samples as they are, float64).
            return_dict: whether to return an `ImagePipelineOutput` or a tuple.
        """
        config, device = self.transformer.config, self._execution_device
        labels = self._ids(class_labels, num_images).to(device)
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device)
        if latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, not {tuple(latents.shape)}")
        scale = guidance_scale if class_labels is not None else 1.0
        samples = self._integrate(latents.to(device).double(), labels, num_inference_steps, scale)
        if output_type != "latent":
            samples = (self._decode(samples) / 2 + 0.5).clamp(0, 1)
            if output_type != "pt":
                samples = samples.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                samples = self.numpy_to_pil(samples)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=samples) if return_dict else (samples,)

    def _ids(self, class_labels, num_images):
        """Return the label of each image; the number of classes means none."""
        count = self.transformer.config.num_classes
        if class_labels is None:
            return torch.full((num_images,), count)
        given = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels]
        unknown = [label for label in given if label not in self.labels and label not in range(count)]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no class: they are 0 .. {count - 1}, and {list(self.labels)[:20]}")
        return torch.tensor([self.labels.get(label, label) for label in given])

    def _integrate(self, noise, labels, num_steps, scale):
        """Heun's method from unit noise to samples (arXiv 2206.00364, algorithm 1), in float64."""
        times = self.process.times(num_steps)
        x = self.process.first(times[0]) * noise
        for t, t_next in self.progress_bar(list(itertools.pairwise(times))):
            slope = self.process.slope(x, self._denoise(x, t, labels, scale), t)
            x_next = x + (t_next - t) * slope
            if t_next > 0:
                slope_next = self.process.slope(x_next, self._denoise(x_next, t_next, labels, scale), t_next)
                x_next = x + (t_next - t) * (slope + slope_next) / 2
            x = x_next
        return x

    def _denoise(self, x, t, labels, scale):
        """Return D with classifier-free guidance (arXiv 2207.12598)."""
        c_in, c_noise, c_skip, c_out = self.process.coefficients(t)
        if scale != 1:
            none = torch.full_like(labels, self.transformer.config.num_classes)
            x, labels = torch.cat([x, x]), torch.cat([labels, none])
        inputs, dtype = (c_in * x).to(self.transformer.dtype), torch.float32
        raw = self.transformer(inputs, c_noise.to(x.device, dtype).expand(len(x)), labels)
        denoised = c_skip * x + c_out * raw.double()
        if scale == 1:
            return denoised
        labelled, unlabelled = denoised.chunk(2)
        return unlabelled + scale * (labelled - unlabelled)

    def _decode(self, samples):
        """Return images in [-1, 1] of samples."""
        space = self.config.latents
        if space is None:
            return samples.float()
        if self.vae is None:
            if not self.config.vae_name:
                raise ValueError("the VAE of these latents is not known: set pipe.vae, or ask for output_type='latent'")
            self.vae = AutoencoderKL.from_pretrained(self.config.vae_name).to(samples.device)
        settings = self.vae.config
        scale = space.get("scale", settings.scaling_factor)
        shift = space.get("shift", getattr(settings, "shift_factor", None) or 0.0)
        scale, shift = (torch.tensor(v, device=samples.device).view(-1, 1, 1).double() for v in (scale, shift))
        return self.vae.decode((samples / scale + shift).to(self.vae.dtype)).sample.float()
