//! What a configuration means for a run whose data and ranks are known.

use candle_core::DType;

use super::super::{
    AdamWOptions, DeepSpeedSchedule, Linear, LoraOptions, LoraTarget, LossScaleOptions, LrSchedule,
    Order, Remainder, Sampler, StepCounts, ZeroStage,
};
use super::{Precision, TrainConfig};

/// Tokens that are computed in one pass, at least: enough for the products to be efficient.
const TOKENS_PER_PASS: usize = 2048;

impl TrainConfig {
    /// Returns the order of `num_examples` training examples on `world_size` ranks.
    pub fn sampler(&self, num_examples: usize, world_size: usize) -> Sampler {
        let seed = self.data.data_seed.unwrap_or(self.seed);
        Sampler {
            num_examples,
            batch_size: self.batch.per_device_train_batch_size,
            world_size,
            order: if self.data.disable_shuffling {
                Order::Sequential
            } else {
                Order::Shuffled { seed }
            },
            remainder: if self.batch.dataloader_drop_last {
                Remainder::Drop
            } else {
                Remainder::Keep
            },
        }
    }

    /// Returns the updates of a run over `num_examples` examples on `world_size` ranks.
    pub fn step_counts(&self, num_examples: usize, world_size: usize) -> StepCounts {
        let sampler = self.sampler(num_examples, world_size);
        StepCounts::new(
            sampler.batches_per_epoch() as u64,
            self.batch.gradient_accumulation_steps as u64,
            self.batch.duration,
        )
    }

    /// Returns the updates of the warm-up: DeepSpeed's own number, else the run's.
    pub fn warmup_updates(&self, counts: &StepCounts) -> u64 {
        let schedule = &self.schedule;
        self.deepspeed_schedule()
            .and_then(|schedule| schedule.warmup_num_steps)
            .unwrap_or_else(|| counts.warmup_updates(schedule.warmup_steps, schedule.warmup_ratio))
    }

    /// Returns DeepSpeed's schedule, which overrides the run's, if there is one.
    pub fn deepspeed_schedule(&self) -> Option<DeepSpeedSchedule> {
        self.deepspeed.as_ref().and_then(|config| config.schedule)
    }

    /// Returns the learning rate of every update.
    pub fn lr_schedule(&self, counts: &StepCounts) -> LrSchedule {
        let warmup = self.warmup_updates(counts);
        let own = self.schedule.schedule(counts, warmup);
        match self.deepspeed_schedule() {
            Some(schedule) => LrSchedule {
                curve: schedule.curve,
                ..own
            },
            None => own,
        }
    }

    /// Returns the numbers of the optimizer.
    pub fn adamw_options(&self) -> AdamWOptions {
        let optimizer = &self.optimizer;
        AdamWOptions {
            beta1: optimizer.adam_beta1,
            beta2: optimizer.adam_beta2,
            epsilon: optimizer.adam_epsilon,
            weight_decay: optimizer.weight_decay,
            max_grad_norm: optimizer.max_grad_norm,
            loraplus_lr_ratio: self.lora.loraplus_lr_ratio.unwrap_or(1.0),
        }
    }

    /// Returns the numbers of the adapter.
    pub fn lora_options(&self) -> LoraOptions {
        LoraOptions {
            rank: self.lora.lora_rank,
            alpha: self.lora.lora_alpha,
            dropout: self.lora.lora_dropout as f32,
            use_rslora: self.lora.use_rslora,
            use_dora: self.lora.use_dora,
            modules_to_save: self.lora.additional_target.clone(),
            // DeepSpeed makes the whole model of the type asked for, adapters included; without
            // it LLaMA-Factory and PEFT keep what is trained in f32.
            dtype: match (&self.deepspeed, self.precision) {
                (Some(_), Precision::Bf16) => DType::BF16,
                (Some(_), Precision::Fp16) => DType::F16,
                _ => DType::F32,
            },
            target: lora_target(&self.lora.lora_target),
        }
    }

    /// Returns the tokens of micro-batches that are computed together, at most.
    pub fn max_tokens_per_pass(&self) -> usize {
        TOKENS_PER_PASS.max(self.data.cutoff_len)
    }

    /// Returns the loss scale of fp16: DeepSpeed's, else torch's.
    pub fn loss_scale(&self) -> Option<LossScaleOptions> {
        let deepspeed = self.deepspeed.as_ref();
        let own = deepspeed.map(|config| config.loss_scale);
        let scale = own.unwrap_or_else(LossScaleOptions::torch);
        (self.precision == Precision::Fp16).then_some(scale)
    }

    /// Returns what ranks divide among them.
    pub fn zero_stage(&self) -> ZeroStage {
        let stage = self.deepspeed.as_ref().map(|config| config.stage);
        stage.unwrap_or(ZeroStage::Zero)
    }
}

/// Returns the linears that `lora_target` names; `all` may have others beside it, the head say.
fn lora_target(names: &[String]) -> LoraTarget {
    let (all, mut others): (Vec<String>, Vec<String>) =
        names.iter().cloned().partition(|name| name == "all");
    match (all.is_empty(), others.is_empty()) {
        (true, _) => LoraTarget::Modules(others),
        (false, true) => LoraTarget::All,
        (false, false) => {
            others.extend(Linear::ALL.map(|linear| linear.name().to_owned()));
            LoraTarget::Modules(others)
        }
    }
}
