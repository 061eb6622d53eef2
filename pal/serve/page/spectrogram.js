// A mel spectrogram in decibels, computed in pieces so that the page stays responsive, and its picture.

export const BANDS = 80;
const COLUMNS = 800;
const FRAMES = 4; // of a column, where a column is longer than a window
const RANGE = 70; // decibels below the loudest that are told apart
const PIECE = 12; // milliseconds of computing between two pauses
const COLOURS = [
  [0, 0, 4],
  [59, 15, 112],
  [140, 41, 129],
  [222, 73, 104],
  [254, 159, 109],
  [252, 253, 191],
];

const toMel = (hz) => 2595 * Math.log10(1 + hz / 700);
const toHz = (mel) => 700 * (10 ** (mel / 2595) - 1);

/**
 * A canvas of one pixel a column and band, with the strongest frequency in Hz.
 * `wanted` tells whether it is still needed; null where it is not.
 */
export async function spectrogram(samples, rate, wanted) {
  const length = 2 ** Math.round(Math.log2(rate * 0.032));
  const fft = new Fft(2 * length); // padded with zeros
  const bands = melBands(fft.size, rate);
  const columns = Math.max(1, Math.min(COLUMNS, Math.ceil((4 * samples.length) / length)));
  const step = samples.length / columns;
  const frames = Math.max(1, Math.min(FRAMES, Math.floor(step / length)));
  const window = Float32Array.from({ length }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / length));
  const levels = new Float32Array(columns * BANDS);
  let since = performance.now();
  for (let column = 0; column < columns; column++) {
    const power = new Float32Array(length + 1);
    for (let frame = 0; frame < frames; frame++) {
      const first = Math.round((column + (frame + 0.5) / frames) * step - length / 2);
      fft.addPower(samples, first, window, power);
    }
    bands.forEach((weights, band) => {
      let sum = 0;
      for (const [bin, weight] of weights) sum += weight * power[bin];
      levels[column * BANDS + band] = 10 * Math.log10(sum / frames + 1e-10);
    });
    if (performance.now() - since > PIECE) {
      await new Promise((resolve) => setTimeout(resolve));
      if (!wanted()) return null;
      since = performance.now();
    }
  }
  return { canvas: paint(levels, columns), strongest: strongest(levels, columns, rate) };
}

function strongest(levels, columns, rate) {
  const sums = new Float64Array(BANDS);
  for (let i = 0; i < columns * BANDS; i++) sums[i % BANDS] += 10 ** (levels[i] / 10);
  const band = sums.indexOf(Math.max(...sums));
  return toHz(((band + 1) * toMel(rate / 2)) / (BANDS + 1));
}

function paint(levels, columns) {
  const canvas = document.createElement("canvas");
  canvas.width = columns;
  canvas.height = BANDS;
  const image = new ImageData(columns, BANDS);
  const top = levels.reduce((most, level) => Math.max(most, level), -Infinity);
  for (let column = 0; column < columns; column++) {
    for (let band = 0; band < BANDS; band++) {
      const share = Math.max(0, 1 + (levels[column * BANDS + band] - top) / RANGE);
      image.data.set([...colour(share), 255], 4 * ((BANDS - 1 - band) * columns + column));
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function colour(share) {
  const place = Math.min(1, share) * (COLOURS.length - 1);
  const low = Math.min(COLOURS.length - 2, Math.floor(place));
  return COLOURS[low].map((value, i) => value + (place - low) * (COLOURS[low + 1][i] - value));
}

/** For each band, bins of the transform with their weights: triangles of equal width in mel. */
function melBands(size, rate) {
  const edges = Array.from({ length: BANDS + 2 }, (_, i) => (toHz((i * toMel(rate / 2)) / (BANDS + 1)) * size) / rate);
  return Array.from({ length: BANDS }, (_, band) => {
    const [low, centre, high] = edges.slice(band, band + 3);
    const found = [];
    for (let bin = Math.ceil(low); bin <= Math.min(high, size / 2); bin++) {
      const weight = bin < centre ? (bin - low) / (centre - low) : (high - bin) / (high - centre);
      if (weight > 0) found.push([bin, weight]);
    }
    return found.length ? found : [[Math.round(centre), 1]];
  });
}

/** The fast Fourier transform of real samples, radix 2. */
export class Fft {
  constructor(size) {
    this.size = size;
    this.real = new Float32Array(size);
    this.imaginary = new Float32Array(size);
    this.cosines = Float32Array.from({ length: size / 2 }, (_, i) => Math.cos((2 * Math.PI * i) / size));
    this.sines = Float32Array.from({ length: size / 2 }, (_, i) => -Math.sin((2 * Math.PI * i) / size));
    const bits = Math.log2(size);
    this.order = Uint32Array.from({ length: size }, (_, i) => {
      let reversed = 0;
      for (let bit = 0; bit < bits; bit++) reversed |= ((i >> bit) & 1) << (bits - 1 - bit);
      return reversed;
    });
  }

  /** Add to `power` that of the windowed samples from `first` on; there is silence around the samples. */
  addPower(samples, first, window, power) {
    const { size, real, imaginary, order } = this;
    imaginary.fill(0);
    for (let i = 0; i < size; i++) {
      const at = first + i;
      real[order[i]] = i < window.length && at >= 0 && at < samples.length ? samples[at] * window[i] : 0;
    }
    for (let half = 1; half < size; half *= 2) this.combine(half);
    for (let i = 0; i < power.length; i++) power[i] += real[i] ** 2 + imaginary[i] ** 2;
  }

  combine(half) {
    const { size, real, imaginary, cosines, sines } = this;
    const stride = size / (2 * half);
    for (let start = 0; start < size; start += 2 * half) {
      for (let i = 0; i < half; i++) {
        const even = start + i;
        const odd = even + half;
        const cosine = cosines[i * stride];
        const sine = sines[i * stride];
        const re = real[odd] * cosine - imaginary[odd] * sine;
        const im = real[odd] * sine + imaginary[odd] * cosine;
        real[odd] = real[even] - re;
        imaginary[odd] = imaginary[even] - im;
        real[even] += re;
        imaginary[even] += im;
      }
    }
  }
}
