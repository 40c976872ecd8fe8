//! Draws `training_loss.png` as LLaMA-Factory does: the losses pale, their smoothed course on top.
//!
//! Text is drawn in small dots of its own (`glyphs`), so that no font must be installed.

mod glyphs;

use std::path::Path;

use plotters::prelude::*;

use super::TrainError;
use super::report::TrainerState;
use glyphs::{Anchor, WIDTH, draw_text, draw_upwards};

/// Width and height in pixels: matplotlib's default figure at 100 dots an inch.
const SIZE: (u32, u32) = (640, 480);
/// The frame of the curve: left, right, top and bottom in pixels.
const FRAME: [i32; 4] = [96, 592, 44, 420];
const ORIGINAL: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
/// The colour above at 40 % on white.
const PALE: RGBColor = RGBColor(0xa5, 0xc9, 0xe1);
/// Most labels on an axis.
const MAX_TICKS: f64 = 7.0;

type Canvas<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Draws every loss that the history has a curve of.
///
/// # Errors
/// [`TrainError::Plot`] naming the image.
pub(super) fn plot_losses(dir: &Path, state: &TrainerState) -> Result<(), TrainError> {
    let metrics = [
        ("loss", "training_loss", "training loss"),
        ("eval_loss", "training_eval_loss", "training eval_loss"),
    ];
    for (metric, name, title) in metrics {
        let points = state.curve(metric);
        if points.is_empty() {
            continue;
        }
        let path = dir.join(format!("{name}.png"));
        let folder = dir.file_name().unwrap_or(dir.as_os_str());
        let title = format!("{title} of {}", folder.to_string_lossy());
        draw_beside(&path, &title, metric, &points).map_err(|error| TrainError::Plot {
            path,
            what: error.to_string(),
        })?;
    }
    Ok(())
}

/// Draws into a file of its own and moves it to its place when it is whole.
fn draw_beside(path: &Path, title: &str, metric: &str, points: &[(u64, f64)]) -> Drawn {
    let dir = tempfile::tempdir_in(path.parent().unwrap_or(Path::new(".")))?;
    let unfinished = dir.path().join("curve.png");
    draw(&unfinished, title, metric, points)?;
    std::fs::rename(&unfinished, path)?;
    Ok(())
}

fn draw(path: &Path, title: &str, metric: &str, points: &[(u64, f64)]) -> Drawn {
    let canvas = BitMapBackend::new(path, SIZE).into_drawing_area();
    canvas.fill(&WHITE)?;
    let losses: Vec<f64> = points.iter().map(|point| point.1).collect();
    let smoothed = smooth(&losses);
    let steps = || points.iter().map(|point| point.0 as f64);
    let axes = Axes {
        x: Axis::new(steps(), [FRAME[0], FRAME[1]]),
        y: Axis::new(losses.iter().copied(), [FRAME[3], FRAME[2]]),
    };
    axes.draw(&canvas, metric)?;
    for (values, colour) in [(&losses, PALE), (&smoothed, ORIGINAL)] {
        let place = |(x, &y): (f64, &f64)| (axes.x.pixel(x), axes.y.pixel(y));
        let line: Vec<_> = steps().zip(values).map(place).collect();
        canvas.draw(&PathElement::new(line, colour.stroke_width(2)))?;
    }
    legend(&canvas)?;
    draw_text(
        &canvas,
        &shortened(title),
        (SIZE.0 as i32 / 2, 20),
        Anchor::Middle,
    )?;
    canvas.present()?;
    Ok(())
}

/// Cuts a text that is wider than the image.
fn shortened(text: &str) -> String {
    let most = SIZE.0 as usize / WIDTH;
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let start: String = text.chars().take(most - 3).collect();
    format!("{start}...")
}

fn legend(canvas: &Canvas<'_>) -> Drawn {
    for (row, (text, colour)) in (0..).zip([("original", PALE), ("smoothed", ORIGINAL)]) {
        let (x, y) = (FRAME[1] - 140, FRAME[2] + 18 + 20 * row);
        let line = vec![(x, y), (x + 24, y)];
        canvas.draw(&PathElement::new(line, colour.stroke_width(2)))?;
        draw_text(canvas, text, (x + 32, y), Anchor::Start)?;
    }
    Ok(())
}

/// Both axes of the frame.
struct Axes {
    x: Axis,
    y: Axis,
}

impl Axes {
    fn draw(&self, canvas: &Canvas<'_>, metric: &str) -> Drawn {
        let [left, right, top, bottom] = FRAME;
        canvas.draw(&Rectangle::new(
            [(left, top), (right, bottom)],
            BLACK.stroke_width(1),
        ))?;
        for value in self.x.ticks() {
            let x = self.x.pixel(value);
            canvas.draw(&PathElement::new(vec![(x, bottom), (x, bottom + 4)], BLACK))?;
            draw_text(
                canvas,
                &self.x.label(value),
                (x, bottom + 16),
                Anchor::Middle,
            )?;
        }
        for value in self.y.ticks() {
            let y = self.y.pixel(value);
            canvas.draw(&PathElement::new(vec![(left - 4, y), (left, y)], BLACK))?;
            draw_text(canvas, &self.y.label(value), (left - 8, y), Anchor::End)?;
        }
        draw_text(
            canvas,
            "step",
            ((left + right) / 2, bottom + 38),
            Anchor::Middle,
        )?;
        draw_upwards(canvas, metric, (12, (top + bottom) / 2))
    }
}

/// Numbers along one side of the frame.
struct Axis {
    min: f64,
    max: f64,
    /// Pixels of both ends.
    ends: [i32; 2],
    /// Distance of two labels.
    step: f64,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64>, ends: [i32; 2]) -> Self {
        let finite = values.filter(|value| value.is_finite());
        let start = (f64::INFINITY, f64::NEG_INFINITY);
        let (min, max) = finite.fold(start, |(min, max), value| (min.min(value), max.max(value)));
        let (min, max) = if min <= max { (min, max) } else { (0.0, 1.0) };
        // Room around the curve, and some for a single point.
        let room = if max > min {
            0.05 * (max - min)
        } else {
            0.5 * max.abs().max(1.0)
        };
        let (min, max) = (min - room, max + room);
        let rough = (max - min) / MAX_TICKS;
        let power = 10f64.powf(rough.log10().floor());
        let factor = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .find(|f| f * power >= rough);
        Self {
            min,
            max,
            ends,
            step: factor.unwrap_or(10.0) * power,
        }
    }

    fn pixel(&self, value: f64) -> i32 {
        let share = ((value - self.min) / (self.max - self.min)).clamp(0.0, 1.0);
        let [start, end] = self.ends.map(f64::from);
        (start + share * (end - start)).round() as i32
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let first = (self.min / self.step).ceil() as i64;
        let last = (self.max / self.step).floor() as i64;
        (first..=last).map(|tick| tick as f64 * self.step)
    }

    fn label(&self, value: f64) -> String {
        let digits = (-self.step.log10().floor()).max(0.0) as usize;
        format!("{value:.digits$}")
    }
}

/// Returns an exponential moving average whose memory grows with the number of values.
///
/// w = 1.8 (1 / (1 + e^(-0.05 n)) - 0.5), s = w s + (1 - w) x (LLaMA-Factory's `ploting.py`).
fn smooth(values: &[f64]) -> Vec<f64> {
    let weight = 1.8 * (1.0 / (1.0 + (-0.05 * values.len() as f64).exp()) - 0.5);
    let mut last = values.first().copied().unwrap_or(0.0);
    let step = |value: &f64| {
        last = last * weight + (1.0 - weight) * value;
        last
    };
    values.iter().map(step).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn smoothing_is_llama_factorys() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path = root.join("tests/fixtures/training/plot/smooth.json");
        let goldens: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for case in goldens["cases"].as_array().unwrap() {
            let numbers = |key: &str| -> Vec<f64> {
                let values = case[key].as_array().unwrap().iter();
                values.map(|value| value.as_f64().unwrap()).collect()
            };
            let (got, want) = (smooth(&numbers("values")), numbers("smoothed"));
            assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() < 1e-12, "{got} for {want}");
            }
        }
    }

    fn state(losses: &[f64]) -> TrainerState {
        let entry = |(i, loss): (usize, &f64)| json!({"loss": loss, "step": 10 * (i + 1)});
        let entries = losses.iter().enumerate().map(entry);
        TrainerState {
            log_history: entries
                .map(|entry| entry.as_object().unwrap().clone())
                .collect(),
            ..TrainerState::default()
        }
    }

    #[test]
    fn a_curve_is_drawn_in_both_colours_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let losses: Vec<f64> = (0..40).map(|i| 2.0 / (1.0 + f64::from(i))).collect();
        plot_losses(dir.path(), &state(&losses)).unwrap();
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(names.len(), 1);
        let png = std::fs::read(dir.path().join("training_loss.png")).unwrap();
        assert_eq!(png[..8], *b"\x89PNG\r\n\x1a\n");
        assert_eq!(png[16..24], [0, 0, 2, 128, 0, 0, 1, 224]);
    }

    #[test]
    fn a_title_is_never_wider_than_the_image() {
        assert_eq!(
            shortened("training loss of adapter"),
            "training loss of adapter"
        );
        let cut = shortened(&"x".repeat(200));
        assert!(cut.ends_with("x...") && cut.len() * WIDTH <= 640, "{cut}");
    }

    #[test]
    fn one_point_and_no_number_at_all_can_be_drawn() {
        let dir = tempfile::tempdir().unwrap();
        for losses in [&[1.5][..], &[f64::NAN, 3.0][..]] {
            plot_losses(dir.path(), &state(losses)).unwrap();
        }
        let error = plot_losses(&dir.path().join("missing"), &state(&[1.0])).unwrap_err();
        assert!(error.to_string().contains("training_loss.png"), "{error}");
    }
}
