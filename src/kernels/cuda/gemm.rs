//! Products `x Wᵀ`: our own kernels or cuBLASLt, whichever is faster.
//!
//! Where few rows of x wait for the weights `gemm_small` is ahead: up to 8 rows throughout, up to
//! 16 for the widest and the narrowest products (measured on an H200 with Qwen2.5-7B's shapes,
//! docs/gpu_log.md). Above, cuBLASLt's algorithms and, on Hopper, `gemm_stream` or `gemm_tile` are
//! timed against each other once for each class of rows that steps of one token a sequence have.
//! More rows are cuBLASLt's, whose algorithms are timed for the largest step. FP8 products
//! are `gemm_stream`'s up to 64 rows and `gemm_tile`'s above. `gemm_tile`'s forms with SiLU are
//! timed against each other for the classes; more rows take the form whose waves of tiles waste
//! least.

mod cublaslt;
mod hopper;
mod small;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Result};

use super::driver::{Address, Arg, Driver};
use super::event::Span;
use super::fp8::Scales;
use cublaslt::{Algorithm, Library, Plan};
use hopper::{Hopper, MAX_STREAM_ROWS};

/// How often an algorithm is timed; the first half is not counted.
const TRIALS: usize = 6;
/// What `gemm_stream` saves in a step beside its own time: it begins while the kernel before it
/// runs, and lets the one after it begin. The products of a step of 32 tokens through cuBLASLt cost
/// 3.2 µs more each (on an H100, docs/gpu_log.md).
const OVERLAP_MS: f32 = 0.0032;
/// Steps of up to so many rows are recorded, and so come often.
const MAX_TUNED_ROWS: usize = 512;
/// Rows between one class and the next.
const CLASS_ROWS: usize = 64;

/// One product.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub(super) out: Address,
    pub(super) x: Address,
    pub(super) weight: Address,
    /// Of x and of the weight, which then are E4M3; else both are of the computing type.
    pub(super) scales: Option<Scales>,
    pub(super) bias: Option<Address>,
    /// Of the output's shape, to be added where the kernel can do it.
    pub(super) residual: Option<Address>,
    /// Rows of x.
    pub(super) num_rows: usize,
    /// Columns of the output.
    pub(super) n: usize,
    /// Columns of both.
    pub(super) k: usize,
    /// `F32` (logits) or the computing type.
    pub(super) out_dtype: DType,
}

impl Product {
    /// Returns the kernels' last parameters.
    fn sizes(&self) -> [Arg; 3] {
        [self.num_rows, self.n, self.columns()].map(|size| Arg::I32(size as i32))
    }

    /// Returns the columns of both as the kernels count them, 16 bits each: pairs of FP8.
    fn columns(&self) -> usize {
        match self.scales {
            None => self.k,
            Some(_) => self.k / 2,
        }
    }
}

/// The kernels' type, cuBLASLt, and what was chosen.
pub(super) struct Gemm {
    dtype: DType,
    library: Library,
    hopper: Option<Hopper>,
    /// Rows of the largest step.
    max_rows: usize,
    plans: Mutex<Plans>,
}

/// Rows, columns of the output, columns of x, whether there is a bias, whether the output is f32.
type Key = [usize; 5];

#[derive(Default)]
struct Plans {
    by_shape: HashMap<Key, Planned>,
    /// The fastest way of a class, under the key of its largest number of rows. Whoever comes
    /// first decides, which must be the largest: tiles are made for numbers of rows, and one for
    /// 200 rows takes twice as long for 256 (measured).
    tuned: HashMap<Key, Choice>,
    /// The same of products with SiLU, by class, columns of the output and of x, and whether they
    /// are FP8.
    silu_forms: HashMap<[usize; 4], hopper::Form>,
}

/// What computes a product with SiLU.
#[derive(Clone, Copy)]
pub(super) enum SiluForm {
    Small(small::Form),
    Hopper(hopper::Form),
}

/// Rows of x up to which [`Gemm::silu_form`] may be none.
pub(super) const MAX_PLAIN_SILU_ROWS: usize = hopper::MIN_TILE_ROWS - 1;

/// What computes a class of products.
#[derive(Clone, Copy)]
enum Choice {
    Library(Algorithm),
    Own(hopper::Form),
}

/// What computes products of one shape.
enum Planned {
    Library(Plan),
    Own(hopper::Form),
}

// SAFETY: plans hold descriptors that any thread may use, and are behind a lock.
unsafe impl Send for Gemm {}
// SAFETY: as above.
unsafe impl Sync for Gemm {}

impl Gemm {
    pub(super) fn new(driver: &Driver, dtype: DType, max_rows: usize) -> Result<Self> {
        small::Form::prepare(driver, dtype)?;
        Ok(Self {
            dtype,
            library: Library::new(driver, dtype)?,
            hopper: Hopper::new(driver, dtype)?,
            max_rows,
            plans: Mutex::new(Plans::default()),
        })
    }

    /// Computes `x Wᵀ + bias`, and returns whether the residual was added.
    pub(super) fn multiply(&self, driver: &Driver, product: &Product) -> Result<bool> {
        let &Product { num_rows, n, k, .. } = product;
        if product.scales.is_some() {
            let hopper = self.fp8()?;
            return hopper.multiply(driver, product, hopper.fp8_form(product));
        }
        match small::Form::of(num_rows, n, k) {
            Some(form) => form.multiply(driver, self.dtype, product).map(|()| false),
            None => self.multiply_planned(driver, product),
        }
    }

    /// Returns how a kernel of ours computes `silu(x Gᵀ) · (x Uᵀ)` for `n` outputs; none where two
    /// kernels are faster.
    pub(super) fn silu_form(&self, num_rows: usize, n: usize, k: usize) -> Option<SiluForm> {
        if let Some(form) = small::Form::of(num_rows, 2 * n, k) {
            return Some(SiluForm::Small(form));
        }
        let form = self.hopper.as_ref()?.silu_form(num_rows, n)?;
        Some(SiluForm::Hopper(form))
    }

    /// Returns whether there are kernels for FP8 products.
    pub(super) fn has_fp8(&self) -> bool {
        self.hopper.is_some()
    }

    /// Returns the same as [`Self::silu_form`] of FP8, which one kernel always computes.
    pub(super) fn fp8_silu_form(&self, num_rows: usize, n: usize) -> Result<SiluForm> {
        Ok(SiluForm::Hopper(self.fp8()?.any_silu_form(num_rows, n)))
    }

    fn fp8(&self) -> Result<&Hopper> {
        match &self.hopper {
            Some(hopper) => Ok(hopper),
            None => candle_core::bail!("an FP8 product on a GPU that has no kernels for it"),
        }
    }

    /// Computes `silu(x Gᵀ) · (x Uᵀ)` as [`Self::silu_form`] said.
    pub(super) fn multiply_silu(
        &self,
        driver: &Driver,
        product: &Product,
        form: SiluForm,
    ) -> Result<()> {
        match (form, &self.hopper) {
            (SiluForm::Small(form), _) => form.multiply_silu(driver, self.dtype, product),
            (SiluForm::Hopper(form), Some(hopper)) => {
                let form = self.tuned_silu(driver, product, hopper, form)?;
                hopper.multiply_silu(driver, product, form)
            }
            (SiluForm::Hopper(form), None) => {
                candle_core::bail!("{form:?} was chosen on a GPU that is no Hopper")
            }
        }
    }

    fn multiply_planned(&self, driver: &Driver, product: &Product) -> Result<bool> {
        let key = [
            product.num_rows,
            product.n,
            product.k,
            usize::from(product.bias.is_some()),
            usize::from(product.out_dtype == DType::F32),
        ];
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let Plans {
            by_shape, tuned, ..
        } = &mut *plans;
        let planned = match by_shape.entry(key) {
            Entry::Occupied(planned) => planned.into_mut(),
            Entry::Vacant(place) => place.insert(self.plan(driver, product, key, tuned)?),
        };
        self.run(driver, product, planned)
    }

    fn run(&self, driver: &Driver, product: &Product, planned: &mut Planned) -> Result<bool> {
        match (planned, &self.hopper) {
            (Planned::Own(form), Some(hopper)) => hopper.multiply(driver, product, *form),
            (Planned::Library(plan), _) => self.run_library(driver, product, plan),
            (Planned::Own(form), None) => {
                candle_core::bail!("{form:?} was chosen on a GPU that is no Hopper")
            }
        }
    }

    fn run_library(&self, driver: &Driver, product: &Product, plan: &Plan) -> Result<bool> {
        if let Some(bias) = product.bias {
            plan.set_bias(bias)?;
        }
        self.library.run(driver, product, plan)?;
        Ok(product.residual.is_some())
    }

    fn plan(
        &self,
        driver: &Driver,
        product: &Product,
        key: Key,
        tuned: &mut HashMap<Key, Choice>,
    ) -> Result<Planned> {
        let [num_rows, n, k, bias, is_f32] = key;
        let Some(class) = self.class_of(num_rows) else {
            return Ok(Planned::Library(Plan::new(&self.library, product)?.0));
        };
        let choice = match tuned.entry([class, n, k, bias, is_f32]) {
            Entry::Occupied(choice) => *choice.get(),
            Entry::Vacant(place) => *place.insert(self.tune(driver, product)?),
        };
        match choice {
            Choice::Own(form) => Ok(Planned::Own(form)),
            Choice::Library(algorithm) => {
                let (mut plan, _) = Plan::new(&self.library, product)?;
                if plan.accepts(&self.library, &algorithm) {
                    plan.algorithm = algorithm;
                }
                Ok(Planned::Library(plan))
            }
        }
    }

    /// Returns the largest number of rows that is computed as so many, if many steps have them.
    fn class_of(&self, num_rows: usize) -> Option<usize> {
        match num_rows {
            rows if rows == self.max_rows => Some(rows),
            ..=32 => Some(32),
            33..=MAX_TUNED_ROWS => Some(num_rows.next_multiple_of(CLASS_ROWS)),
            _ => None,
        }
    }

    /// Returns what computes the product fastest.
    fn tune(&self, driver: &Driver, product: &Product) -> Result<Choice> {
        let (mut plan, algorithms) = Plan::new(&self.library, product)?;
        let first = plan.algorithm;
        let own = self.hopper.as_ref().and_then(|own| own.candidate(product));
        let choices = algorithms.into_iter().map(Choice::Library);
        let choices = choices.chain(own.map(Choice::Own)).collect();
        let run = |choice| match (choice, &self.hopper) {
            (Choice::Library(algorithm), _) => {
                plan.algorithm = algorithm;
                self.run_library(driver, product, &plan).map(|_| ())
            }
            (Choice::Own(form), Some(hopper)) => hopper.multiply(driver, product, form).map(|_| ()),
            (Choice::Own(form), None) => {
                candle_core::bail!("{form:?} is no form of this GPU")
            }
        };
        let saved = |choice| match (choice, product.num_rows) {
            (Choice::Own(_), ..=MAX_STREAM_ROWS) => OVERLAP_MS,
            _ => 0.0,
        };
        let fastest = self.fastest(driver, choices, run, saved)?;
        let (time, choice) = fastest.unwrap_or((f32::INFINITY, Choice::Library(first)));
        tracing::debug!(
            "product of {} x {} by {}: {:.1} µs, {}",
            product.num_rows,
            product.k,
            product.n,
            1e3 * time,
            match choice {
                Choice::Library(_) => "cuBLASLt".to_owned(),
                Choice::Own(form) => format!("{form:?}"),
            }
        );
        Ok(choice)
    }

    /// Returns the fastest form of `gemm_tile` where that is what `form` says and steps of one
    /// token a sequence have so many rows, else `form`.
    fn tuned_silu(
        &self,
        driver: &Driver,
        product: &Product,
        hopper: &Hopper,
        form: hopper::Form,
    ) -> Result<hopper::Form> {
        let class = match form {
            hopper::Form::Tile(_) if product.num_rows <= MAX_TUNED_ROWS => {
                self.class_of(product.num_rows)
            }
            _ => None,
        };
        let Some(class) = class else {
            return Ok(form);
        };
        let is_fp8 = usize::from(product.scales.is_some());
        let key = [class, product.n, product.k, is_fp8];
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&form) = plans.silu_forms.get(&key) {
            return Ok(form);
        }
        let candidates = Hopper::tiled_silu_forms();
        let run = |form| hopper.multiply_silu(driver, product, form);
        let fastest = self.fastest(driver, candidates, run, |_| 0.0)?;
        let (time, form) = fastest.unwrap_or((f32::INFINITY, form));
        tracing::debug!(
            "product with SiLU of {} x {} by 2 x {}: {:.1} µs, {form:?}",
            product.num_rows,
            product.k,
            product.n,
            1e3 * time
        );
        plans.silu_forms.insert(key, form);
        Ok(form)
    }

    /// Times choices and returns the fastest with its milliseconds, less what it has `saved`
    /// beside them; none if none can run.
    ///
    /// They take turns without a pause, as in steps: a GPU that has just begun to work runs at a
    /// higher clock.
    fn fastest<C: Copy>(
        &self,
        driver: &Driver,
        mut choices: Vec<C>,
        mut run: impl FnMut(C) -> Result<()>,
        saved: impl Fn(C) -> f32,
    ) -> Result<Option<(f32, C)>> {
        choices.retain(|&choice| run(choice).is_ok());
        let mut rounds = Vec::with_capacity(TRIALS);
        for _ in 0..TRIALS {
            let timed = |&choice| {
                // Weights must come from memory, as in a step.
                self.library.flush_cache(driver)?;
                Span::of(driver, || run(choice))
            };
            rounds.push(choices.iter().map(timed).collect::<Result<Vec<_>>>()?);
        }
        let mut fastest: Option<(f32, C)> = None;
        for (index, &choice) in choices.iter().enumerate() {
            let counted = rounds[TRIALS / 2..].iter();
            let times = counted.map(|spans| spans[index].milliseconds(driver));
            let mut times = times.collect::<Result<Vec<_>>>()?;
            times.sort_by(f32::total_cmp);
            let time = times[times.len() / 2] - saved(choice);
            if fastest.is_none_or(|(least, _)| time < least) {
                fastest = Some((time, choice));
            }
        }
        Ok(fastest)
    }
}
