//! Faulty and hostile templates and messages; what good ones render is in `tests/it`.

use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// Far above what any of these takes in a debug build on a busy machine, far below a hang.
const TIME_LIMIT: Duration = Duration::from_secs(20);

fn render(source: &str) -> Result<String, TextError> {
    let messages = [json!({"role": "user", "content": "hi"})];
    ChatTemplate::compile(source, &[])?.render(&RenderInput {
        messages: &messages,
        ..RenderInput::default()
    })
}

/// Renders on a stack as small as a server thread's, and fails rather than hangs.
fn render_in_thread(source: &'static str) -> Result<String, TextError> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().stack_size(2 << 20);
    let running = thread.spawn(move || sender.send(render(source)));
    let result = receiver.recv_timeout(TIME_LIMIT);
    let result = result.unwrap_or_else(|error| panic!("{source}: {error}"));
    running.unwrap().join().unwrap().unwrap();
    result
}

#[test]
fn raised_message_is_kept_word_for_word() {
    let error =
        render("\n{% if messages %}{{ raise_exception('Roles <must> alternate!') }}{% endif %}");
    let error = error.unwrap_err();
    assert!(matches!(error, TextError::TemplateRaised { .. }));
    assert_eq!(error.to_string(), "Roles <must> alternate!");
    assert!(error.is_user_error());
}

#[test]
fn message_raised_inside_a_macro_is_kept() {
    let error = render("{% macro f() %}{{ raise_exception('no') }}{% endmacro %}{{ f() }}");
    assert_eq!(error.unwrap_err().to_string(), "no");
}

#[test]
fn syntax_error_names_the_line() {
    let error = render("a\nb\n{% if %}\n{% endif %}").unwrap_err();
    let TextError::TemplateSyntax { line, message } = error else {
        panic!("{error:?}");
    };
    assert_eq!(line, 3);
    assert!(message.contains("syntax error"), "{message}");
}

#[test]
fn render_error_names_the_line() {
    let error = render("a\n{{ messages[0].role }}\n{{ nope.attribute }}").unwrap_err();
    assert!(
        matches!(error, TextError::TemplateRender { line: 3, .. }),
        "{error:?}"
    );
}

#[test]
fn messages_that_are_no_objects_are_refused_by_index() {
    let template = ChatTemplate::compile("{{ messages }}", &[]).unwrap();
    let messages = [json!({"role": "user"}), json!("text")];
    let input = RenderInput {
        messages: &messages,
        ..RenderInput::default()
    };
    let error = template.render(&input).unwrap_err();
    assert_eq!(error.to_string(), "messages[1] must be an object");
}

#[test]
fn continuing_and_prompting_exclude_each_other() {
    let template = ChatTemplate::compile("{{ messages[0].content }}", &[]).unwrap();
    let messages = [json!({"role": "assistant", "content": "a"})];
    let mut input = RenderInput {
        messages: &messages,
        add_generation_prompt: true,
        continue_final_message: true,
        ..RenderInput::default()
    };
    assert!(matches!(
        template.render(&input),
        Err(TextError::InvalidMessages { .. })
    ));
    input.add_generation_prompt = false;
    assert_eq!(template.render(&input).unwrap(), "a");
    input.messages = &[];
    assert!(matches!(
        template.render(&input),
        Err(TextError::InvalidMessages { .. })
    ));
}

#[test]
fn endless_work_is_refused() {
    for source in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(100000) %}{{ 'x' * 100000 }}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for a in range(100) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for a in range(9) %}{% set ns.s = ns.s.replace('x', 'x' * 1000) %}{% endfor %}",
        "{% set ns = namespace(l=[1]) %}{% for a in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(l=[1]) %}{% for a in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
        "{{ 'x'.ljust(99999999999) }}",
        "{{ 'x'.join(range(100000) | map('string')) | length }}{% for a in range(100000) %}{{ 'abc'.join(['d'] * 100000) }}{% endfor %}",
        "{{ '%99999999d' | format(1) }}{{ '%999999999d' | format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
    ] {
        let error = render_in_thread(source);
        assert!(
            error.is_err(),
            "{source} rendered {} bytes",
            error.unwrap().len()
        );
    }
}

#[test]
fn deeply_nested_values_do_not_overflow_the_stack() {
    for source in [
        "{% set ns = namespace(l=[1]) %}{% for a in range(100000) %}{% set ns.l = [ns.l] %}{% endfor %}",
        "{% set ns = namespace(l=[1]) %}{% for a in range(100000) %}{% set ns.l = {'a': ns.l} %}{% endfor %}",
        "{% set ns = namespace(l=[1]) %}{% for a in range(100000) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l ~ '' }}",
    ] {
        let _ = render_in_thread(source);
    }
}

#[test]
fn endless_recursion_is_refused() {
    for source in [
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(x) %}{% for i in [1] %}{% if true %}{{ f([x]) | upper }}{% endif %}{% endfor %}{% endmacro %}{{ f(1) }}",
        "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    ] {
        let error = render_in_thread(source).unwrap_err();
        assert!(error.is_user_error(), "{error:?}");
    }
    let nested = format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000));
    assert!(matches!(
        render(&nested),
        Err(TextError::TemplateSyntax { .. })
    ));
    let blocks = "{% if true %}".repeat(5000);
    assert!(matches!(
        render(&blocks),
        Err(TextError::TemplateSyntax { .. })
    ));
}

#[test]
fn reasoning_is_found_under_any_of_its_names() {
    let template = ChatTemplate::compile(
        "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }};{% endfor %}",
        &[],
    )
    .unwrap();
    let messages = [
        json!({"role": "assistant", "reasoning": "a"}),
        json!({"role": "assistant", "thinking": "b", "reasoning": "c"}),
        json!({"role": "assistant", "reasoning_content": null}),
    ];
    let input = RenderInput {
        messages: &messages,
        ..RenderInput::default()
    };
    assert_eq!(template.render(&input).unwrap(), "a|a;b|b;None|;");
}

proptest! {
    #[test]
    fn no_template_panics(source in "(\\{%|%\\}|\\{\\{|\\}\\}|[a-z '\"|.(),\\[\\]:0-9-]| if | for | in |endif|generation|tojson|messages){0,24}") {
        let _ = render(&source);
    }
}
