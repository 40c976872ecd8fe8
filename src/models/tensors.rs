//! Names and shapes of the tensors that a model of a configuration has.

use super::ModelConfig;

impl ModelConfig {
    /// Returns name and shape of every tensor, as Hugging Face checkpoints name them.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        );
        let mut tensors = vec![(
            "model.embed_tokens.weight".to_owned(),
            vec![self.vocab_size, hidden],
        )];
        let linears = [
            ("self_attn.q_proj", q, hidden, self.qkv_bias),
            ("self_attn.k_proj", kv, hidden, self.qkv_bias),
            ("self_attn.v_proj", kv, hidden, self.qkv_bias),
            ("self_attn.o_proj", hidden, q, self.o_bias),
            ("mlp.gate_proj", inner, hidden, self.mlp_bias),
            ("mlp.up_proj", inner, hidden, self.mlp_bias),
            ("mlp.down_proj", hidden, inner, self.mlp_bias),
        ];
        for layer in 0..self.num_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            for (part, rows, cols, has_bias) in linears {
                tensors.push((name(&format!("{part}.weight")), vec![rows, cols]));
                if has_bias {
                    tensors.push((name(&format!("{part}.bias")), vec![rows]));
                }
            }
            if self.qk_norm {
                tensors.push((name("self_attn.q_norm.weight"), vec![self.head_dim]));
                tensors.push((name("self_attn.k_norm.weight"), vec![self.head_dim]));
            }
            tensors.push((name("input_layernorm.weight"), vec![hidden]));
            tensors.push((name("post_attention_layernorm.weight"), vec![hidden]));
        }
        tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !self.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        tensors
    }

    /// Returns the number of weights of the decoder layers' linears, without biases.
    pub fn num_linear_parameters(&self) -> usize {
        let is_linear = |name: &str| name.ends_with("_proj.weight");
        let tensors = self.tensors().into_iter();
        let linears = tensors.filter(|(name, _)| is_linear(name));
        linears
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qwen2_5_7b_has_the_parameters_that_its_card_says() {
        let config = ModelConfig::from_json(&serde_json::json!({
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
            "max_position_embeddings": 32768, "tie_word_embeddings": false,
        }))
        .unwrap();
        let tensors = config.tensors();
        assert_eq!(tensors.len(), 339);
        let num_parameters: usize = tensors
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        assert_eq!(num_parameters, 7_615_616_512);
        // Each layer's q, k, v, o and three of the MLP.
        let layer = 3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944;
        assert_eq!(config.num_linear_parameters(), 28 * layer);
    }
}
