//! Token ids and labels are LLaMA-Factory's: goldens of
//! `scripts/make_training_template_goldens.py`.

use serde::Deserialize;

use super::encode::Element;
use super::*;
use crate::text::{
    LearnedTurns, PromptLabels, SupervisedOptions, encode_supervised, truncated_lengths,
};

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

#[derive(Deserialize)]
struct Goldens {
    date: String,
    conversations: Vec<GoldenConversation>,
    turns: Vec<GoldenTurns>,
    examples: Vec<GoldenExample>,
    pairs: Vec<GoldenPairs>,
}

#[derive(Deserialize)]
struct GoldenConversation {
    system: Option<String>,
    tools: Option<String>,
    messages: Vec<GoldenMessage>,
}

#[derive(Deserialize)]
struct GoldenMessage {
    role: String,
    content: String,
}

#[derive(Deserialize)]
struct GoldenTemplate {
    template: String,
    conversation: usize,
    thinking: Option<Thinking>,
    keeps_thoughts: bool,
}

#[derive(Deserialize)]
struct GoldenTurns {
    #[serde(flatten)]
    template: GoldenTemplate,
    turns: Vec<(Vec<u32>, Vec<u32>)>,
    oneturn: Option<(Vec<u32>, Vec<u32>)>,
}

#[derive(Deserialize)]
struct GoldenOptions {
    cutoff_len: usize,
    mask_history: bool,
    train_on_prompt: bool,
    #[serde(default)]
    efficient_eos: bool,
    input_ids: Vec<u32>,
    labels: Vec<i64>,
}

#[derive(Deserialize)]
struct GoldenExample {
    #[serde(flatten)]
    template: GoldenTemplate,
    #[serde(flatten)]
    options: GoldenOptions,
}

#[derive(Deserialize)]
struct GoldenPairs {
    lengths: Vec<(usize, usize)>,
    #[serde(flatten)]
    options: GoldenOptions,
}

fn goldens() -> Goldens {
    let path = format!("{FIXTURES}/training_template/goldens.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(format!("{FIXTURES}/tiny-qwen2").as_ref()).unwrap()
}

impl GoldenConversation {
    fn to_conversation(&self) -> Conversation {
        let role = |name: &str| match name {
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "observation" => Role::Observation,
            "function" => Role::Function,
            _ => panic!("role {name}"),
        };
        let messages = self.messages.iter();
        Conversation {
            system: self.system.clone(),
            tools: self.tools.clone(),
            messages: messages
                .map(|message| Message::new(role(&message.role), message.content.as_str()))
                .collect(),
        }
    }
}

impl GoldenTemplate {
    fn to_template(&self) -> TrainingTemplate {
        let template = TrainingTemplate::named(&self.template).unwrap();
        let history = if self.keeps_thoughts {
            ThoughtHistory::Kept
        } else {
            ThoughtHistory::Dropped
        };
        match self.thinking {
            Some(thinking) => template.with_thinking(thinking, history),
            None => template.clone(),
        }
    }
}

impl GoldenOptions {
    fn learned_turns(&self) -> LearnedTurns {
        if self.mask_history {
            LearnedTurns::Last
        } else {
            LearnedTurns::All
        }
    }

    fn check(&self, turns: &[EncodedTurn], case: &str) {
        let options = SupervisedOptions {
            cutoff_len: self.cutoff_len,
            learned_turns: self.learned_turns(),
            prompt_labels: if self.train_on_prompt {
                PromptLabels::Learned
            } else {
                PromptLabels::Masked
            },
            efficient_eos: self.efficient_eos.then_some(0),
        };
        match encode_supervised(turns, &options) {
            Some(example) => {
                assert_eq!(example.input_ids, self.input_ids, "{case}");
                assert_eq!(example.labels, self.labels, "{case}");
            }
            None => assert!(self.labels.iter().all(|label| *label == -100), "{case}"),
        }
    }
}

/// Encodes with the date of the goldens instead of today's.
fn encode(
    template: &TrainingTemplate,
    tokenizer: &Tokenizer,
    messages: Vec<Vec<Element>>,
) -> Vec<EncodedTurn> {
    let ids: Vec<Vec<u32>> = messages
        .iter()
        .map(|elements| template.tokenize(tokenizer, elements).unwrap())
        .collect();
    ids.chunks(2)
        .map(|pair| EncodedTurn {
            prompt_ids: pair[0].clone(),
            response_ids: pair[1].clone(),
        })
        .collect()
}

#[test]
fn token_ids_of_every_turn_are_llama_factorys() {
    let goldens = goldens();
    let tokenizer = tokenizer();
    for (index, golden) in goldens.turns.iter().enumerate() {
        let template = golden.template.to_template();
        let conversation = goldens.conversations[golden.template.conversation].to_conversation();
        let case = format!("turns[{index}]: {} {conversation:?}", template.name());
        let messages = template.elements(&conversation, LearnedTurns::All, &goldens.date);
        let got = encode(&template, &tokenizer, messages.unwrap());
        let got: Vec<_> = got
            .into_iter()
            .map(|turn| (turn.prompt_ids, turn.response_ids))
            .collect();
        assert_eq!(got, golden.turns, "{case}");
        let Some(want) = &golden.oneturn else {
            continue;
        };
        let messages = template.oneturn_elements(&conversation, &goldens.date);
        let mut messages = messages.unwrap();
        let response = template
            .tokenize(&tokenizer, &messages.pop().unwrap())
            .unwrap();
        let prompt = template.tokenize(&tokenizer, &messages.concat()).unwrap();
        assert_eq!(&(prompt, response), want, "{case}");
    }
}

#[test]
fn ids_and_labels_of_examples_are_llama_factorys() {
    let goldens = goldens();
    let tokenizer = tokenizer();
    for (index, golden) in goldens.examples.iter().enumerate() {
        let template = golden.template.to_template();
        let conversation = goldens.conversations[golden.template.conversation].to_conversation();
        let learned = golden.options.learned_turns();
        let messages = template
            .elements(&conversation, learned, &goldens.date)
            .unwrap();
        let turns = encode(&template, &tokenizer, messages);
        golden
            .options
            .check(&turns, &format!("examples[{index}]: {}", template.name()));
    }
}

#[test]
fn cuts_and_masks_are_llama_factorys_for_any_lengths() {
    for (index, golden) in goldens().pairs.iter().enumerate() {
        let mut ids = 1..;
        let mut take = |count: usize| ids.by_ref().take(count).collect::<Vec<u32>>();
        let turns: Vec<EncodedTurn> = golden
            .lengths
            .iter()
            .map(|&(prompt, response)| EncodedTurn {
                prompt_ids: take(prompt),
                response_ids: take(response),
            })
            .collect();
        golden
            .options
            .check(&turns, &format!("pairs[{index}]: {:?}", golden.lengths));
    }
}

/// LLaMA-Factory's own table.
#[test]
fn prompt_and_response_share_a_budget() {
    let cases = [
        ((3000, 2000, 1000), (600, 400)),
        ((2000, 3000, 1000), (400, 600)),
        ((1000, 100, 1000), (900, 100)),
        ((100, 1000, 1000), (100, 900)),
        ((100, 500, 1000), (100, 500)),
        ((500, 100, 1000), (500, 100)),
        ((10, 10, 1000), (10, 10)),
        ((0, 0, 0), (0, 0)),
        ((5, 5, 1), (1, 0)),
    ];
    for ((prompt, response, budget), want) in cases {
        assert_eq!(truncated_lengths(prompt, response, budget), want);
    }
}

#[test]
fn public_functions_put_the_same_elements_together() {
    let tokenizer = tokenizer();
    let template = TrainingTemplate::named("qwen").unwrap();
    let mut conversation = Conversation {
        messages: vec![
            Message::new(Role::User, "a"),
            Message::new(Role::Assistant, "b"),
            Message::new(Role::User, "c"),
        ],
        ..Conversation::default()
    };
    let text = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful \
                assistant.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\
                b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(
        template.render_prompt(&tokenizer, &conversation).unwrap(),
        text
    );
    let prompt = template.encode_prompt(&tokenizer, &conversation).unwrap();
    conversation
        .messages
        .push(Message::new(Role::Assistant, "d"));
    let one = template.encode_oneturn(&tokenizer, &conversation).unwrap();
    assert_eq!(one.prompt_ids, prompt);
    let many = template.encode_multiturn(&tokenizer, &conversation, LearnedTurns::All);
    let many = many.unwrap();
    assert_eq!(many[1].response_ids, one.response_ids);
    let before = [
        &many[0].prompt_ids[..],
        &many[0].response_ids,
        &many[1].prompt_ids,
    ]
    .concat();
    assert_eq!(before, prompt);
}

#[test]
fn default_system_prompt_gives_way_to_the_conversations() {
    let tokenizer = tokenizer();
    let template = TrainingTemplate::named("qwen")
        .unwrap()
        .with_default_system("Mine.");
    let with = |system: Option<&str>| {
        let conversation = Conversation {
            system: system.map(str::to_owned),
            messages: vec![Message::new(Role::User, "a")],
            ..Conversation::default()
        };
        template.render_prompt(&tokenizer, &conversation).unwrap()
    };
    assert!(with(None).starts_with("<|im_start|>system\nMine.<|im_end|>"));
    assert_eq!(with(None), with(Some("")));
    assert!(with(Some("Theirs.")).starts_with("<|im_start|>system\nTheirs.<|im_end|>"));
}

#[test]
fn unknown_template_is_answered_with_the_nearest() {
    let error = TrainingTemplate::named("qwen2").unwrap_err().to_string();
    assert_eq!(
        error,
        "no training template \"qwen2\": did you mean \"qwen\"? The templates are qwen, \
         qwen@0.9.2, qwen3, qwen3_nothink, llama3, chatml, smollm, smollm2, default, \
         default@0.9.2, empty"
    );
}

#[test]
fn faulty_conversations_are_refused_with_what_was_wanted() {
    let tokenizer = tokenizer();
    let template = TrainingTemplate::named("qwen").unwrap();
    let call = |content: &str| {
        vec![
            Message::new(Role::User, "a"),
            Message::new(Role::Function, content),
        ]
    };
    let cases = [
        (
            None,
            vec![Message::new(Role::User, "a")],
            "1 messages; wanted pairs",
        ),
        (None, Vec::new(), "0 messages"),
        (None, call("not json"), "is not JSON"),
        (None, call("{\"name\": \"f\"}"), "without name or arguments"),
        (Some("{\"a\": 1}"), call("[]"), "is not a JSON list"),
        (Some("[1]"), call("[]"), "entry 0 that is not an object"),
        (Some("[{"), call("[]"), "is not JSON"),
    ];
    for (tools, messages, want) in cases {
        let conversation = Conversation {
            tools: tools.map(str::to_owned),
            messages,
            ..Conversation::default()
        };
        let learned = LearnedTurns::Last;
        let error = template.encode_multiturn(&tokenizer, &conversation, learned);
        let error = error.unwrap_err();
        assert!(matches!(error, TextError::InvalidMessages { .. }));
        assert!(error.to_string().contains(want), "{error}");
    }
}

#[test]
fn record_brings_the_template_back() {
    let template = TrainingTemplate::named("qwen3")
        .unwrap()
        .with_default_system("Mine.")
        .with_thinking(Thinking::Disabled, ThoughtHistory::Kept);
    let json = serde_json::to_string(&TemplateRecord::new(&template)).unwrap();
    assert_eq!(
        json,
        "{\"template\":\"qwen3\",\"default_system\":\"Mine.\",\"thinking\":\"disabled\",\
         \"thought_history\":\"kept\"}"
    );
    let record: TemplateRecord = serde_json::from_str(&json).unwrap();
    assert_eq!(record.to_template().unwrap(), template);
}
