//! How byte-level vocabularies of GGUF files cut a text into words before merging.
//!
//! A GGUF file names the way (`tokenizer.ggml.pre`) instead of carrying it. The names and what they
//! stand for are those of llama.cpp (`llama-vocab.cpp`); the expressions are written as the models'
//! own `tokenizer.json` files have them. Each expression cuts the pieces that the one before left.

use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

use super::TextError;

pub(super) const GPT2: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const DEEPSEEK_V3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

/// A way of cutting, and what comes with it in llama.cpp.
#[derive(Debug, Clone, Copy)]
pub(super) struct PreTokenizer {
    expressions: &'static [&'static str],
    /// A word that is a token stays whole even if no merges lead to it.
    pub(super) ignore_merges: bool,
    /// A text begins with the begin-of-sequence token unless the file says otherwise.
    pub(super) add_bos: bool,
}

impl PreTokenizer {
    /// Finds the way of cutting that a GGUF file names; none named is llama.cpp's default.
    ///
    /// # Errors
    /// A name not known here: a guess would give wrong tokens without a sign of it.
    pub(super) fn named(pre: Option<&str>) -> Result<Self, TextError> {
        let of = |expressions| Self {
            expressions,
            ignore_merges: false,
            add_bos: false,
        };
        let found = match pre.unwrap_or("default") {
            "default" => of(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]),
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" => Self {
                ignore_merges: true,
                add_bos: true,
                ..of(&[LLAMA3])
            },
            "dbrx" | "smaug-bpe" => of(&[LLAMA3]),
            "qwen2" | "deepseek-r1-qwen" | "stablelm2" | "hunyuan" => of(&[QWEN2]),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone"
            | "minerva-7b" => of(&[r"\p{N}", GPT2]),
            "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" | "granite-docling"
            | "roberta-bpe" => of(&[GPT2]),
            "tekken" => Self {
                ignore_merges: true,
                add_bos: true,
                ..of(&[TEKKEN])
            },
            "deepseek-v3" => of(&[r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3]),
            "falcon" => of(&[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"]),
            unknown => {
                return Err(TextError::UnsupportedPreTokenizer {
                    pre: unknown.to_owned(),
                });
            }
        };
        Ok(found)
    }

    /// Returns llama.cpp's name of the way of cutting with these expressions, one after the other.
    pub(super) fn name_of(expressions: &[&str], ignore_merges: bool) -> Option<&'static str> {
        // Of names for one way the one that most models have.
        const NAMES: [&str; 6] = ["qwen2", "llama-bpe", "smollm", "gpt-2", "tekken", "dbrx"];
        NAMES.into_iter().find(|name| {
            Self::named(Some(name)).is_ok_and(|known| {
                known.expressions == expressions && known.ignore_merges == ignore_merges
            })
        })
    }

    /// Builds the pre-tokenizer, ending in the byte alphabet.
    pub(super) fn build(self) -> tokenizers::Result<PreTokenizerWrapper> {
        let mut steps = Vec::with_capacity(self.expressions.len() + 1);
        for expression in self.expressions {
            let pattern = SplitPattern::Regex((*expression).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
            steps.push(PreTokenizerWrapper::Split(split));
        }
        steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(
            false, true, false,
        )));
        Ok(PreTokenizerWrapper::Sequence(Sequence::new(steps)))
    }
}
