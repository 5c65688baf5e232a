//! Ranges and temperatures from passes over texts.

use veiltune_engine::{Owner, Plain, Result};

use super::config::{Attention, AttentionRanges, LanguageConfig};
use super::{LanguageCheckpoint, LanguageModel};
use crate::{Error, Result as ModelResult};

/// How often temperatures are lowered, by half each time, until all denominators are above noise.
const ATTEMPTS: usize = 8;

impl LanguageCheckpoint {
    /// `config` with ranges that hold what `pass` shows, widened by `margin` on both sides. `pass` runs `embed`, `forward` or `hidden`
    /// and, if there is a masked-LM head, `logits`, once for each batch of texts that it has, and rewinds the interpreter before
    /// each.
    ///
    /// Of random feature attention the temperatures come first. The score q . k / sqrt(width) of a trained model varies with the
    /// lengths of q and k, which random features must leave out; one constant for each head takes their place. It is the one with
    /// which the attention's output comes closest to that of softmax on these texts, because neither the mean score nor the spread
    /// of the angles says how much noise a sharper kernel adds. It is lowered where a denominator comes near zero all the same.
    pub fn calibrate(
        &self,
        config: &LanguageConfig,
        margin: f64,
        mut pass: impl FnMut(&Plain, &LanguageModel<Plain>) -> Result<()>,
    ) -> ModelResult<LanguageConfig> {
        let mut config = LanguageConfig {
            folded: false,
            ..config.clone()
        }
        .with_attention(config.attention);
        if let Attention::Rfa { .. } = config.attention {
            let plain = Plain::new();
            let mut model = self.load(&plain, Owner::Public, &config)?;
            for (i, block) in model.blocks.iter_mut().enumerate() {
                block.attention.try_temperatures(&config, i);
            }
            pass(&plain, &model)?;
            for (layer, block) in config.layers.iter_mut().zip(&model.blocks) {
                if let (AttentionRanges::Rfa { temperature, .. }, Some(best)) =
                    (&mut layer.attention, block.attention.best_temperatures())
                {
                    *temperature = best;
                }
            }
        }
        for _ in 0..ATTEMPTS {
            let b = Plain::recording();
            let model = self.load(&b, Owner::Public, &config)?;
            pass(&b, &model)?;
            if !config.lower_temperatures(&b.sites()) {
                config.calibrate(&b.sites(), margin)?;
                return Ok(config);
            }
        }
        Err(Error::Config(format!(
            "random features do not fit this model: denominators near zero after {ATTEMPTS} attempts; use more features, or softmax"
        )))
    }
}
