//! A tokenizer from the vocabulary that a GGUF file carries.

use ahash::AHashMap;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{Prepend, Replace, Sequence as NormalizerSequence};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, Tokenizer as HfTokenizer};

use super::pre_tokenizer::PreTokenizer;
use super::tokenizer::{Tokenizer, TokenizerParts};
use super::{ChatTemplateSources, GgufVocabulary, TextError, tokenizer_json};

/// How errors name the source.
const ORIGIN: &str = "the GGUF vocabulary";
/// `tokenizer.ggml.token_type` of control tokens (`<|im_start|>`).
pub(super) const CONTROL: i32 = 3;
/// `tokenizer.ggml.token_type` of tokens matched whole but kept in the text (`<think>`).
pub(super) const USER_DEFINED: i32 = 4;

impl Tokenizer {
    /// Builds the tokenizer of a GGUF file.
    ///
    /// # Errors
    /// A kind of vocabulary or of word splitting that is not known here, lists that do not fit each
    /// other, a token id outside the vocabulary.
    pub fn from_vocabulary(vocabulary: GgufVocabulary) -> Result<Self, TextError> {
        check_lengths(&vocabulary)?;
        let (mut inner, add_bos_by_default) = match vocabulary.model.as_str() {
            "gpt2" => byte_level(&vocabulary)?,
            "llama" => (sentencepiece(&vocabulary)?, true),
            model => {
                return Err(TextError::UnsupportedVocabulary {
                    model: model.to_owned(),
                });
            }
        };
        add_marked_tokens(&mut inner, &vocabulary).map_err(invalid)?;
        let mut chat_templates = ChatTemplateSources::default();
        if let Some(template) = vocabulary.chat_template {
            chat_templates.insert("default", template);
        }
        for (name, template) in vocabulary.named_chat_templates {
            chat_templates.insert(&name, template);
        }
        let ids = [
            ("bos_token", vocabulary.bos),
            ("eos_token", vocabulary.eos),
            ("unk_token", vocabulary.unknown),
            ("pad_token", vocabulary.padding),
            ("eot_token", vocabulary.eot),
        ];
        let mut named = Vec::new();
        for (name, id) in ids {
            let Some(id) = id else { continue };
            let vocab_size = vocabulary.tokens.len();
            let content = vocabulary
                .tokens
                .get(id as usize)
                .ok_or(TextError::UnknownTokenId { id, vocab_size })?;
            named.push((name.to_owned(), content.clone()));
        }
        let parts = TokenizerParts {
            named,
            add_bos: vocabulary.add_bos.unwrap_or(add_bos_by_default),
            add_eos: vocabulary.add_eos.unwrap_or(false),
            chat_templates,
        };
        Self::assemble(inner, parts, Some(vocabulary.tokens), ORIGIN)
    }
}

fn invalid(source: Box<dyn std::error::Error + Send + Sync>) -> TextError {
    TextError::InvalidTokenizer {
        origin: ORIGIN.to_owned(),
        source,
    }
}

fn check_lengths(vocabulary: &GgufVocabulary) -> Result<(), TextError> {
    let num_tokens = vocabulary.tokens.len();
    let lists = [
        ("token types", vocabulary.token_types.len()),
        ("scores", vocabulary.scores.len()),
    ];
    match lists
        .into_iter()
        .find(|&(_, len)| len != 0 && len != num_tokens)
    {
        Some((list, found)) => Err(TextError::VocabularyLength {
            num_tokens,
            list,
            found,
        }),
        None => Ok(()),
    }
}

/// Builds a `gpt2` vocabulary; also returns whether a text begins with the begin token by default.
fn byte_level(vocabulary: &GgufVocabulary) -> Result<(HfTokenizer, bool), TextError> {
    let pre = PreTokenizer::named(vocabulary.pre.as_deref())?;
    let mut merges = Vec::with_capacity(vocabulary.merges.len());
    for (index, merge) in vocabulary.merges.iter().enumerate() {
        let (left, right) = merge
            .split_once(' ')
            .ok_or_else(|| TextError::InvalidMerge {
                origin: ORIGIN.to_owned(),
                index,
                left: merge.clone(),
                right: String::new(),
            })?;
        merges.push((left.to_owned(), right.to_owned()));
    }
    let vocab = token_ids(&vocabulary.tokens);
    tokenizer_json::check_merges(&vocab, &merges, "", ORIGIN)?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(invalid)?;
    let mut inner = HfTokenizer::new(bpe);
    inner
        .with_pre_tokenizer(Some(pre.build().map_err(invalid)?))
        .with_decoder(Some(ByteLevel::default()));
    Ok((inner, pre.add_bos))
}

/// Builds a `llama` vocabulary: a SentencePiece BPE has scores in place of merges, so every way to
/// make a token of two others becomes a merge, tried in the order of the scores.
fn sentencepiece(vocabulary: &GgufVocabulary) -> Result<HfTokenizer, TextError> {
    let vocab = token_ids(&vocabulary.tokens);
    let merges = merges_by_score(vocabulary, &vocab);
    let mut bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .byte_fallback(true)
        .fuse_unk(true);
    let unknown = vocabulary.unknown.unwrap_or(0) as usize;
    if let Some(token) = vocabulary.tokens.get(unknown) {
        bpe = bpe.unk_token(token.clone());
    }
    let mut inner = HfTokenizer::new(bpe.build().map_err(invalid)?);
    let space = Replace::new(" ", "\u{2581}").map_err(invalid)?;
    let mut normalizers = vec![NormalizerWrapper::Replace(space)];
    let mut decoders = vec![
        DecoderWrapper::Replace(Replace::new("\u{2581}", " ").map_err(invalid)?),
        DecoderWrapper::ByteFallback(ByteFallback::new()),
        DecoderWrapper::Fuse(Fuse::new()),
    ];
    if vocabulary.add_space_prefix.unwrap_or(true) {
        let prefix = Prepend::new("\u{2581}".to_owned());
        normalizers.insert(0, NormalizerWrapper::Prepend(prefix));
        decoders.push(DecoderWrapper::Strip(Strip::new(' ', 1, 0)));
    }
    inner
        .with_normalizer(Some(NormalizerSequence::new(normalizers)))
        .map_err(invalid)?
        .with_decoder(Some(DecoderSequence::new(decoders)));
    Ok(inner)
}

fn merges_by_score(
    vocabulary: &GgufVocabulary,
    vocab: &AHashMap<String, u32>,
) -> Vec<(String, String)> {
    let score = |id: usize| vocabulary.scores.get(id).copied().unwrap_or(0.0);
    let mut found = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if is_marked(vocabulary, id) || vocab.get(token) != Some(&(id as u32)) {
            continue;
        }
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if let (Some(&left_id), Some(&right_id)) = (vocab.get(left), vocab.get(right)) {
                found.push((score(id), left_id, right_id, left, right));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    found
        .into_iter()
        .map(|(_, _, _, left, right)| (left.to_owned(), right.to_owned()))
        .collect()
}

fn is_marked(vocabulary: &GgufVocabulary, id: usize) -> bool {
    matches!(
        vocabulary.token_types.get(id),
        Some(&(CONTROL | USER_DEFINED))
    )
}

fn token_ids(tokens: &[String]) -> AHashMap<String, u32> {
    let mut vocab = AHashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        // Of equal strings the first is the one that a text encodes to.
        vocab.entry(token.clone()).or_insert(id as u32);
    }
    vocab
}

/// Makes control tokens special and user-defined ones whole.
fn add_marked_tokens(
    inner: &mut HfTokenizer,
    vocabulary: &GgufVocabulary,
) -> tokenizers::Result<()> {
    let marked = |kind: i32| {
        vocabulary
            .tokens
            .iter()
            .zip(&vocabulary.token_types)
            .filter(move |(token, found)| **found == kind && !token.is_empty())
            .map(move |(token, _)| {
                AddedToken::from(token.clone(), kind == CONTROL).normalized(false)
            })
    };
    inner.add_tokens(marked(CONTROL).chain(marked(USER_DEFINED)))?;
    Ok(())
}
