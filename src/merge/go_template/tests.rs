//! What Go renders, in small pieces.

use serde_json::{Value, json};

use super::GoTemplate;

fn render(source: &str, data: &Value) -> String {
    GoTemplate::parse(source).unwrap().render(data).unwrap()
}

#[test]
fn pieces_render_as_in_go() {
    let data = json!({"A": "x", "E": "", "L": ["p", "q"], "O": {"k": [1, 2.0]}, "N": 3});
    let cases = [
        ("a {{ .A }} b", "a x b"),
        ("a \n{{- .A -}}\n b", "axb"),
        (
            "{{ if .E }}1{{ else if eq .A \"x\" }}2{{ else }}3{{ end }}",
            "2",
        ),
        (
            "{{ if and .A (not .E) }}1{{ end }}{{ if or .E .Missing }}2{{ end }}",
            "1",
        ),
        (
            "{{ range $i, $v := .L }}{{ $i }}{{ $v }}{{ . }}{{ $.A }}{{ end }}",
            "0ppx1qqx",
        ),
        (
            "{{ $p := \"\" }}{{ range .L }}{{ $p }}{{ $p = . }}{{ end }}{{ $p }}",
            "pq",
        ),
        (
            "{{ $p := 1 }}{{ if .A }}{{ $p := 2 }}{{ $p }}{{ end }}{{ $p }}",
            "21",
        ),
        ("{\"a\": {{ .O }}}", "{\"a\": {\"k\": [1, 2.0]}}"),
        (
            "{{ len .L }}{{ gt (len .L) 1 }}{{ gt .N -1 }}{{ lt .N 3 }}",
            "2truetruefalse",
        ),
        ("{{ $l := -1 }}{{ $l }}{{ \"a\\n}}\" }}", "-1a\n}}"),
        ("{{ .O.k }}", "[1, 2.0]"),
    ];
    for (source, want) in cases {
        assert_eq!(render(source, &data), want, "{source}");
    }
}

#[test]
fn faults_say_what_is_wrong() {
    let cases = [
        ("{{ if .A }}", "an if ends with File"),
        ("{{ end }}", "without a beginning"),
        ("{{ .A", "not closed with }}"),
        (
            "{{ slice .A 1 }}",
            "the function \"slice\" is not known here",
        ),
        ("{{ eq .A }}", "Eq has 1 arguments"),
        ("{{ (not .A }}", "a ( is not closed"),
        ("{{ .A | len }}", "'|' is not understood"),
        ("{{ \"a }}", "a string is not closed"),
        ("{{ range .A }}{{ else }}{{ end }}", "a range ends with"),
    ];
    for (source, want) in cases {
        let error = GoTemplate::parse(source).unwrap_err().to_string();
        assert!(error.contains(want), "{source}: {error}");
    }
    for (source, want) in [
        ("{{ $x }}", "undefined variable $x"),
        ("{{ gt .A 1 }}", "whole number"),
        ("{{ eq .A 1 }}", "compared"),
    ] {
        let template = GoTemplate::parse(source).unwrap();
        let error = template.render(&json!({"A": "x"})).unwrap_err().to_string();
        assert!(error.contains(want), "{source}: {error}");
    }
}
