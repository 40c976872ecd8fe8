//! `tokenizer.json` into a `tokenizers` tokenizer, fast and without trusting it.
//!
//! `tokenizers` reads the file into a tree of its own before it builds the model, and its BPE
//! builder panics on some merges. Here a BPE file, which is what every supported model ships, is read
//! straight into its tables and its merges are checked; all other files go the library's way.

use std::fmt;

use ahash::AHashMap;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use tokenizers::models::bpe::BPE;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Tokenizer as HfTokenizer,
};

use super::TextError;

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedTokenEntry>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<PostProcessorWrapper>,
    decoder: Option<DecoderWrapper>,
    model: BpeFile,
}

#[derive(Deserialize)]
struct AddedTokenEntry {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

#[derive(Deserialize)]
struct BpeFile {
    #[serde(rename = "type")]
    kind: Option<String>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
    vocab: Vocab,
    merges: Merges,
}

/// Reads the bytes of a `tokenizer.json`.
///
/// # Errors
/// Bytes that are not such a file, or tables in it that do not fit each other. `origin` names it.
pub(super) fn parse(bytes: &[u8], origin: &str) -> Result<HfTokenizer, TextError> {
    let invalid = |source| TextError::InvalidTokenizer {
        origin: origin.to_owned(),
        source,
    };
    let file = match serde_json::from_slice::<TokenizerFile>(bytes) {
        Ok(file) if file.model.is_plain_bpe() => file,
        Ok(_) | Err(_) => return parse_any(bytes, origin),
    };
    let bpe = build_bpe(file.model, origin)?;
    let mut tokenizer = HfTokenizer::new(bpe);
    tokenizer
        .with_normalizer(file.normalizer)
        .map_err(invalid)?
        .with_pre_tokenizer(file.pre_tokenizer)
        .with_post_processor(file.post_processor)
        .with_decoder(file.decoder);
    let ids: Vec<(u32, String)> = file
        .added_tokens
        .iter()
        .map(|entry| (entry.id, entry.token.content.clone()))
        .collect();
    tokenizer
        .add_tokens(file.added_tokens.into_iter().map(|entry| entry.token))
        .map_err(invalid)?;
    for (id, content) in ids {
        // `tokenizers` numbers added tokens itself; a gap would shift all that follow.
        let got = tokenizer.token_to_id(&content);
        if got != Some(id) {
            return Err(invalid(
                format!("added token {content:?} has id {id} in the file but would get {got:?}")
                    .into(),
            ));
        }
    }
    Ok(tokenizer)
}

/// Models other than plain BPE, and the library's own words for what is wrong with a file.
fn parse_any(bytes: &[u8], origin: &str) -> Result<HfTokenizer, TextError> {
    #[derive(Deserialize)]
    struct Probe {
        model: BpeFile,
    }
    // The library's BPE builder panics on merges that make a token longer than any it knows.
    if let Ok(Probe { model }) = serde_json::from_slice::<Probe>(bytes) {
        check_merges(&model.vocab.0, &model.merges.0, model.prefix(), origin)?;
    }
    HfTokenizer::from_bytes(bytes).map_err(|source| TextError::InvalidTokenizer {
        origin: origin.to_owned(),
        source,
    })
}

impl BpeFile {
    /// Returns whether the model is a BPE without the options that no language model uses.
    fn is_plain_bpe(&self) -> bool {
        self.kind.as_deref().is_none_or(|kind| kind == "BPE")
            && self.dropout.is_none()
            && self.prefix().is_empty()
    }

    fn prefix(&self) -> &str {
        self.continuing_subword_prefix.as_deref().unwrap_or("")
    }
}

fn build_bpe(file: BpeFile, origin: &str) -> Result<BPE, TextError> {
    check_merges(&file.vocab.0, &file.merges.0, "", origin)?;
    let mut builder = BPE::builder()
        .vocab_and_merges(file.vocab.0, file.merges.0)
        .fuse_unk(file.fuse_unk)
        .byte_fallback(file.byte_fallback)
        .ignore_merges(file.ignore_merges);
    if let Some(token) = file.unk_token {
        builder = builder.unk_token(token);
    }
    if let Some(suffix) = file.end_of_word_suffix.filter(|suffix| !suffix.is_empty()) {
        builder = builder.end_of_word_suffix(suffix);
    }
    builder
        .build()
        .map_err(|source| TextError::InvalidTokenizer {
            origin: origin.to_owned(),
            source,
        })
}

/// Refuses merges that make a longer token than the vocabulary has: the builder of `tokenizers`
/// panics on those. It finds unknown parts and wholes itself, with lookups that it needs anyway.
pub(super) fn check_merges(
    vocab: &AHashMap<String, u32>,
    merges: &[(String, String)],
    prefix: &str,
    origin: &str,
) -> Result<(), TextError> {
    let longest = vocab.keys().map(String::len).max().unwrap_or(0);
    let fits = |left: &str, right: &str| {
        let rest = right.get(prefix.len()..);
        rest.is_some_and(|rest| left.len() + rest.len() <= longest)
    };
    match merges.iter().position(|(left, right)| !fits(left, right)) {
        Some(index) => {
            let (left, right) = merges[index].clone();
            Err(TextError::InvalidMerge {
                origin: origin.to_owned(),
                index,
                left,
                right,
            })
        }
        None => Ok(()),
    }
}

/// Token to id, read without growing step by step.
pub(super) struct Vocab(pub(super) AHashMap<String, u32>);

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct VocabVisitor;
        impl<'de> Visitor<'de> for VocabVisitor {
            type Value = Vocab;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of tokens to ids")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab, A::Error> {
                let mut vocab = AHashMap::with_capacity(1 << 17);
                while let Some((token, id)) = map.next_entry::<String, u32>()? {
                    vocab.insert(token, id);
                }
                Ok(Vocab(vocab))
            }
        }
        deserializer.deserialize_map(VocabVisitor)
    }
}

/// Pairs, written as `["a", "b"]` or, in older files, as `"a b"`.
pub(super) struct Merges(pub(super) Vec<(String, String)>);

struct Merge(String, String);

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let merges = Vec::<Merge>::deserialize(deserializer)?;
        Ok(Self(merges.into_iter().map(|Merge(a, b)| (a, b)).collect()))
    }
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MergeVisitor;
        impl<'de> Visitor<'de> for MergeVisitor {
            type Value = Merge;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a pair of tokens")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Merge, E> {
                let (left, right) = text
                    .split_once(' ')
                    .ok_or_else(|| E::custom(format!("merge {text:?} is not a pair")))?;
                Ok(Merge(left.to_owned(), right.to_owned()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Merge, A::Error> {
                let pair = (seq.next_element()?, seq.next_element()?);
                match pair {
                    (Some(left), Some(right)) => Ok(Merge(left, right)),
                    _ => Err(A::Error::custom("a merge has two parts")),
                }
            }
        }
        deserializer.deserialize_any(MergeVisitor)
    }
}
