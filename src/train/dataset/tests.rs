//! Data sets from files, with the messages that a person sees when they are wrong.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::text::{Conversation, Role};

use super::numpy::RandomState;
use super::{DataError, DataRequest, LoadedData, load_data, select};

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    dir
}

fn request(dir: &Path, dataset: &str) -> DataRequest {
    DataRequest {
        dataset_dir: dir.to_owned(),
        dataset: dataset.split(',').map(str::to_owned).collect(),
        eval_dataset: Vec::new(),
        max_samples: None,
        val_size: 0.0,
        max_dropped_ratio: 1.0,
        seed: 42,
    }
}

fn load(files: &[(&str, &[u8])], dataset: &str) -> Result<LoadedData, DataError> {
    let dir = folder(files);
    load_data(&request(dir.path(), dataset))
}

/// Loads one file under a description of it.
fn load_as(info: &str, file: &str, content: &str) -> Result<LoadedData, DataError> {
    load(
        &[
            ("dataset_info.json", info.as_bytes()),
            (file, content.as_bytes()),
        ],
        "d",
    )
}

fn turns(conversation: &Conversation) -> Vec<(Role, &str)> {
    let turn = conversation.messages.iter();
    turn.map(|turn| (turn.role, turn.content.as_str()))
        .collect()
}

const ALPACA_INFO: &str = r#"{"d": {"file_name": "d.json"}}"#;

#[test]
fn alpaca_joins_instruction_and_input_by_a_newline() {
    let rows = r#"[{"instruction": "翻译", "input": "你好", "output": "hello"},
                   {"instruction": "Hi", "input": "", "output": "Hello!"}]"#;
    let data = load_as(ALPACA_INFO, "d.json", rows).unwrap();
    assert_eq!(
        turns(&data.train[0]),
        [(Role::User, "翻译\n你好"), (Role::Assistant, "hello")]
    );
    assert_eq!(turns(&data.train[1])[0], (Role::User, "Hi"));
    assert_eq!(data.train[0].system, None);
}

#[test]
fn alpaca_reads_history_system_and_tools_only_when_named() {
    let rows =
        r#"[{"q": "3", "a": "4", "history": [["1", "2"]], "sys": "S", "tools": [{"name": "f"}]}]"#;
    let info = r#"{"d": {"file_name": "d.json", "columns": {"prompt": "q", "response": "a",
        "history": "history", "system": "sys", "tools": "tools"}}}"#;
    let data = load_as(info, "d.json", rows).unwrap();
    let texts: Vec<&str> = turns(&data.train[0]).iter().map(|turn| turn.1).collect();
    assert_eq!(texts, ["1", "2", "3", "4"]);
    assert_eq!(data.train[0].system.as_deref(), Some("S"));
    assert_eq!(data.train[0].tools.as_deref(), Some(r#"[{"name": "f"}]"#));

    let rows = r#"[{"instruction": "q", "output": "a", "system": "S"}]"#;
    let data = load_as(ALPACA_INFO, "d.json", rows).unwrap();
    assert_eq!(data.train[0].system, None);
    assert!(data.reports[0].warnings[0].contains("`system` that is not read"));
}

#[test]
fn sharegpt_takes_a_leading_system_turn_and_calls_of_tools() {
    let rows = r#"[{"conversations": [
        {"from": "system", "value": "S"}, {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."}]}]"#;
    let info = r#"{"d": {"file_name": "d.json", "formatting": "sharegpt"}}"#;
    let data = load_as(info, "d.json", rows).unwrap();
    let roles: Vec<Role> = turns(&data.train[0]).iter().map(|turn| turn.0).collect();
    assert_eq!(
        roles,
        [
            Role::User,
            Role::Function,
            Role::Observation,
            Role::Assistant
        ]
    );
    assert_eq!(data.train[0].system.as_deref(), Some("S"));
}

#[test]
fn openai_collects_calls_and_joins_results() {
    let rows = r#"{"messages": [{"role": "user", "content": "two cities"},
        {"role": "assistant", "content": null, "tool_calls": [
          {"type": "function", "function": {"name": "w", "arguments": "{\"city\": \"北京\"}"}}]},
        {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"},
        {"role": "assistant", "content": [{"type": "text", "text": "done"}]}]}"#
        .replace('\n', " ");
    let info = r#"{"d": {"file_name": "d.jsonl", "formatting": "openai"}}"#;
    let data = load_as(info, "d.jsonl", &rows).unwrap();
    assert_eq!(
        turns(&data.train[0])[1..],
        [
            (
                Role::Function,
                r#"[{"name": "w", "arguments": {"city": "北京"}}]"#
            ),
            (Role::Observation, "1\n</tool_response>\n<tool_response>\n2"),
            (Role::Assistant, "done")
        ]
    );
}

#[test]
fn unusable_rows_are_reported_by_reason_with_their_numbers() {
    let rows = r#"[{"instruction": "a", "output": "b"}, {"instruction": "a", "output": {"x": 1}},
        {"instruction": "a"}, {"output": "b"}, 7, {"instruction": "a", "output": ["c"]},
        {"instruction": "a", "output": {}}]"#;
    let data = load_as(ALPACA_INFO, "d.json", rows).unwrap();
    let report = &data.reports[0];
    assert_eq!((report.num_rows, report.num_kept), (7, 1));
    assert_eq!(
        report.reasons(),
        [
            "2 rows: `output` is an object instead of a string (rows 2, 7)",
            "1 row: `output` is missing (row 3)",
            "1 row: `instruction` is missing (row 4)",
            "1 row: the row is a number instead of an object (row 5)",
            "1 row: `output` is a list instead of a string (row 6)",
        ]
    );
}

#[test]
fn wrong_turns_are_dropped_with_the_roles_wanted() {
    let rows = r#"[
      {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
      {"conversations": [{"from": "user", "value": "a"}, {"from": "gpt", "value": "b"}]},
      {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
      {"conversations": [{"from": "human", "value": "a"}]},
      {"conversations": []}, {"text": "x"}]"#;
    let info = r#"{"d": {"file_name": "d.json", "formatting": "sharegpt"}}"#;
    let data = load_as(info, "d.json", rows).unwrap();
    assert_eq!(
        data.reports[0].reasons(),
        [
            "1 row: Invalid role tag \"user\" where \"human\" or \"observation\" must speak (row 2)",
            "1 row: Invalid role tag \"gpt\" where \"human\" or \"observation\" must speak (row 3)",
            "1 row: Invalid message count: the last turn is not the model's (row 4)",
            "1 row: `conversations` is an empty list (row 5)",
            "1 row: `conversations` is missing (row 6)",
        ]
    );
}

#[test]
fn all_rows_unusable_names_the_columns_found_and_wanted() {
    let error = load_as(
        ALPACA_INFO,
        "d.json",
        r#"[{"question": "a", "answer": "b"}]"#,
    );
    let text = error.unwrap_err().to_string();
    assert!(
        text.starts_with("Cannot find valid samples in data set \"d\""),
        "{text}"
    );
    assert!(text.contains("the rows have: question, answer"), "{text}");
    assert!(
        text.contains("instruction, input, output (alpaca)"),
        "{text}"
    );
}

#[test]
fn too_many_dropped_rows_stop_the_run() {
    let dir = folder(&[(
        "d.json",
        br#"[{"instruction": "a", "output": "b"}, {"instruction": "a"}, {"instruction": "a"}]"#,
    )]);
    let mut request = request(dir.path(), "d.json");
    request.max_dropped_ratio = 0.5;
    let text = load_data(&request).unwrap_err().to_string();
    assert!(text.contains("2 of 3 rows were dropped"), "{text}");
    request.max_dropped_ratio = 0.7;
    assert_eq!(load_data(&request).unwrap().train.len(), 1);
}

#[test]
fn an_unknown_data_set_names_the_file_its_keys_and_the_nearest() {
    let dir = folder(&[(
        "dataset_info.json",
        br#"{"alpaca_zh": {"file_name": "a.json"}, "identity": {"file_name": "b.json"}}"#,
    )]);
    let error = load_data(&request(dir.path(), "identiy")).unwrap_err();
    let text = error.to_string();
    let info = dir.path().join("dataset_info.json");
    assert!(
        text.starts_with("Undefined dataset identiy in dataset_info.json"),
        "{text}"
    );
    assert!(
        text.contains(&format!("{info:?} has alpaca_zh, identity")),
        "{text}"
    );
    assert!(text.contains("did you mean \"identity\"?"), "{text}");
    assert!(text.contains("--dataset ./identiy.json"), "{text}");
}

#[test]
fn a_missing_description_or_file_is_named() {
    let dir = folder(&[("dataset_info.json", br#"{"d": {"file_name": "gone.json"}}"#)]);
    let text = load_data(&request(dir.path(), "d"))
        .unwrap_err()
        .to_string();
    assert!(text.contains("gone.json\" not found"), "{text}");
    let text = load_data(&request(&dir.path().join("no"), "d")).unwrap_err();
    assert!(text.to_string().starts_with("Cannot open "), "{text}");
    let text = load_data(&request(dir.path(), "./gone.jsonl")).unwrap_err();
    assert!(matches!(text, DataError::FileNotFound { .. }), "{text}");
}

#[test]
fn descriptions_are_checked() {
    let text = |info: &str| load_as(info, "d.json", "[]").unwrap_err().to_string();
    assert!(text(r#"{"d": {"file_nam": "d.json"}}"#).contains("did you mean `file_name`?"));
    assert!(text(r#"{"d": {"hf_hub_url": "x/y"}}"#).contains("download the file"));
    assert!(
        text(r#"{"d": {"file_name": "d.json", "columns": {"promt": "q"}}}"#)
            .contains("unknown key `columns.promt`; did you mean `prompt`?")
    );
    assert!(
        text(r#"{"d": {"file_name": "d.json", "formatting": "chatml"}}"#)
            .contains("must be alpaca, sharegpt or openai")
    );
    assert!(
        text(r#"{"d": {"file_name": "d.json", "ranking": true}}"#)
            .contains("not applicable in the current training stage")
    );
    assert!(text(ALPACA_INFO).contains("is empty"));
    assert!(text("{").contains("not valid JSON"));
}

#[test]
fn a_file_can_be_named_directly_and_its_format_is_told_from_its_rows() {
    let json = br#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    let data = load(&[("chat.jsonl", json)], "chat.jsonl").unwrap();
    assert_eq!(data.reports[0].formatting, "openai");
    let json =
        br#"[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]"#;
    let data = load(&[("x.json", json)], "x.json").unwrap();
    assert_eq!(data.reports[0].formatting, "sharegpt");
    let json = br#"[{"instruction": "a", "output": "b", "system": "S"}]"#;
    let data = load(&[("x.json", json)], "x.json").unwrap();
    assert_eq!(data.train[0].system.as_deref(), Some("S"));
}

#[test]
fn json_lines_csv_and_parquet_hold_the_same_rows() {
    let lines = "{\"instruction\": \"a\", \"input\": \"\", \"output\": \"你,好\"}\n\nnot json\n";
    let from_lines = load(&[("d.jsonl", lines.as_bytes())], "d.jsonl").unwrap();
    assert_eq!(
        from_lines.reports[0].dropped[0].rows[0].row, 3,
        "lines are counted as an editor does"
    );
    let csv = "instruction,input,output\na,,\"你,好\"\nb,c\n";
    let from_csv = load(&[("d.csv", csv.as_bytes())], "d.csv").unwrap();
    assert!(
        from_csv.reports[0].dropped[0]
            .reason
            .contains("2 fields and the header 3")
    );
    assert_eq!(from_csv.train, from_lines.train);
    let dir = folder(&[]);
    write_parquet(&dir.path().join("d.parquet"), &[("a", "你,好")]);
    let from_parquet = load_data(&request(dir.path(), "d.parquet")).unwrap();
    assert_eq!(from_parquet.train, from_lines.train);
}

fn write_parquet(path: &Path, rows: &[(&str, &str)]) {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use std::sync::Arc;

    let schema =
        "message rows { required binary instruction (UTF8); required binary output (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let file = fs::File::create(path).unwrap();
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(file, schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for column in 0..2 {
        let pick = |row: &(&str, &str)| ByteArray::from(if column == 0 { row.0 } else { row.1 });
        let values: Vec<ByteArray> = rows.iter().map(pick).collect();
        let mut column = group.next_column().unwrap().unwrap();
        let typed = column.typed::<ByteArrayType>();
        typed.write_batch(&values, None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn text_lines_are_learned_as_answers_when_described_so() {
    let info = r#"{"d": {"file_name": "d.txt", "columns": {"response": "text"}}}"#;
    let data = load_as(info, "d.txt", "one\ntwo\n").unwrap();
    assert_eq!(
        turns(&data.train[1]),
        [(Role::User, ""), (Role::Assistant, "two")]
    );
    let error = load(&[("d.txt", b"one")], "d.txt").unwrap_err().to_string();
    assert!(error.contains("the rows have: text"), "{error}");
}

#[test]
fn a_byte_order_mark_is_accepted_and_other_encodings_are_named() {
    let row = r#"[{"instruction": "你好", "output": "b"}]"#;
    let marked = format!("\u{feff}{row}");
    let data = load(&[("d.json", marked.as_bytes())], "d.json").unwrap();
    assert_eq!(turns(&data.train[0])[0].1, "你好");

    // 你好 in GBK.
    let gbk = b"[{\"instruction\":\n \"\xc4\xe3\xba\xc3\", \"output\": \"b\"}]";
    let text = load(&[("d.json", gbk)], "d.json").unwrap_err().to_string();
    assert!(text.contains("line 2, byte 19"), "{text}");
    assert!(text.contains("looks like GBK (GB18030)"), "{text}");
    assert!(text.contains("iconv -f GB18030 -t UTF-8"), "{text}");

    let utf16: Vec<u8> = row.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let text = load(&[("d.json", &utf16)], "d.json")
        .unwrap_err()
        .to_string();
    assert!(text.contains("looks like UTF-16"), "{text}");
}

#[test]
fn broken_json_is_located() {
    let text = load(&[("d.json", b"[{\"instruction\": \"a\",}]")], "d.json").unwrap_err();
    assert!(text.to_string().contains("line 1 column"), "{text}");
    let text = load(&[("d.json", b"[{\"instruction\": \"a\"")], "d.json").unwrap_err();
    assert!(text.to_string().contains("the file ends early"), "{text}");
    let text = load(&[("d.json", b"{\n\"instruction\": \"a\"\n}")], "d.json").unwrap_err();
    assert!(
        text.to_string().contains("holds an object where a list"),
        "{text}"
    );
}

#[test]
fn a_directory_is_read_in_order_of_names_and_rows_name_their_file() {
    let a = br#"[{"instruction": "1", "output": "x"}]"#;
    let b = br#"[{"instruction": "2"}, {"instruction": "3", "output": "x"}]"#;
    let info = br#"{"d": {"file_name": "parts"}}"#;
    let files: [(&str, &[u8]); 3] = [
        ("dataset_info.json", info),
        ("parts/b.json", b),
        ("parts/a.json", a),
    ];
    let data = load(&files, "d").unwrap();
    let prompts: Vec<&str> = data.train.iter().map(|row| turns(row)[0].1).collect();
    assert_eq!(prompts, ["1", "3"]);
    assert!(data.reports[0].reasons()[0].ends_with("(row b.json:1)"));
    let text = load(&[files[0], files[1], ("parts/c.csv", b"x\n1\n")], "d").unwrap_err();
    assert!(text.to_string().contains("holds csv, json"), "{text}");
    let text = load(&[("d.arrow", b"x")], "./d.arrow").unwrap_err();
    assert!(
        text.to_string().contains("save the data set as Parquet"),
        "{text}"
    );
}

fn numbered(count: usize) -> Vec<u8> {
    let rows: Vec<String> = (0..count)
        .map(|i| format!(r#"{{"instruction": "{i}", "output": "x"}}"#))
        .collect();
    format!("[{}]", rows.join(",")).into_bytes()
}

fn prompts(rows: &[Conversation]) -> Vec<usize> {
    rows.iter()
        .map(|row| row.messages[0].content.parse().unwrap())
        .collect()
}

#[test]
fn num_samples_and_max_samples_take_numpys_rows() {
    let info = br#"{"d": {"file_name": "d.json", "num_samples": 12}}"#;
    let dir = folder(&[("dataset_info.json", info), ("d.json", &numbered(10))]);
    let mut request = request(dir.path(), "d");
    // np.random.seed(42): permutation(10), then choice(10, 2).
    let all = [8, 1, 5, 0, 7, 2, 9, 4, 3, 6];
    let data = load_data(&request).unwrap();
    assert_eq!(prompts(&data.train)[..10], all);
    assert_eq!(data.train.len(), 12);
    request.max_samples = Some(4);
    assert_eq!(prompts(&load_data(&request).unwrap().train), all[..4]);
}

#[test]
fn val_size_splits_as_datasets_does() {
    let dir = folder(&[("d.json", &numbered(10))]);
    let mut request = request(dir.path(), "d.json");
    request.val_size = 0.25;
    let data = load_data(&request).unwrap();
    assert_eq!(prompts(&data.eval), [5, 6, 0]);
    assert_eq!(prompts(&data.train), [7, 3, 2, 4, 9, 1, 8]);
    request.val_size = 2.0;
    assert_eq!(prompts(&load_data(&request).unwrap().eval), [5, 6]);
    request.val_size = 10.0;
    assert!(matches!(
        load_data(&request),
        Err(DataError::ValSize { .. })
    ));
    request.eval_dataset = vec!["d.json".to_owned()];
    assert!(matches!(
        load_data(&request),
        Err(DataError::TwoEvaluationSets)
    ));
}

#[test]
fn several_data_sets_follow_one_another() {
    let dir = folder(&[("a.json", &numbered(2)), ("b.json", &numbered(3))]);
    let data = load_data(&request(dir.path(), "b.json,a.json")).unwrap();
    assert_eq!(prompts(&data.train), [0, 1, 2, 0, 1]);
    assert_eq!(data.reports.len(), 2);
}

#[test]
fn chinese_file_names_work() {
    let data = load(&[("数据 集.json", &numbered(1))], "数据 集.json").unwrap();
    assert_eq!(data.train.len(), 1);
}

fn golden(name: &str) -> Vec<Value> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/training/order");
    let text = fs::read_to_string(format!("{dir}/{name}.json")).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    json["cases"].as_array().unwrap().clone()
}

fn whole(value: &Value, key: &str) -> usize {
    value[key].as_u64().unwrap() as usize
}

#[test]
fn every_golden_num_samples_is_drawn_as_by_llama_factory() {
    for case in golden("num_samples") {
        let mut random = RandomState::new(whole(&case, "seed") as u64);
        for dataset in case["datasets"].as_array().unwrap() {
            let (rows, samples) = (
                whole(dataset, "num_examples"),
                whole(dataset, "num_samples"),
            );
            let drawn = select(rows, Some(samples), None, &mut random);
            assert_eq!(json!(drawn), dataset["indices"]);
        }
    }
}

#[test]
fn every_golden_val_size_is_split_as_by_datasets() {
    for case in golden("val_size") {
        let content = numbered(whole(&case, "num_examples"));
        let dir = folder(&[("d.json", &content)]);
        let mut request = request(dir.path(), "d.json");
        request.val_size = case["val_size"].as_f64().unwrap();
        request.seed = case["seed"].as_u64().unwrap();
        let data = load_data(&request).unwrap();
        assert_eq!(data.train.len(), whole(&case, "num_train"));
        assert_eq!(json!(prompts(&data.eval)), case["test"]);
        let first = case["train_first"].as_array().unwrap();
        assert_eq!(json!(prompts(&data.train)[..first.len()]), json!(first));
    }
}
