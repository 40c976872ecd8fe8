// Renders the cases of tests/fixtures/modelfile/go_cases.json with Go's text/template, as Ollama
// does, and fails where the text is not the one that the Rust side renders.
//
// The values have Ollama's shapes: structs for messages and tools, and types that print themselves
// as JSON for what a template prints whole. Only the JSON's spacing is Python's instead of Go's.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"text/template"
)

// Raw is JSON that prints as it stands.
type Raw struct{ text string }

func (r Raw) String() string { return r.text }

func (r *Raw) UnmarshalJSON(data []byte) error {
	r.text = spaced(data)
	return nil
}

// spaced puts the blanks of Python's json.dumps behind commas and colons.
func spaced(data []byte) string {
	var compact, out bytes.Buffer
	if err := json.Compact(&compact, data); err != nil {
		panic(err)
	}
	inString, escaped := false, false
	for _, b := range compact.Bytes() {
		out.WriteByte(b)
		switch {
		case escaped:
			escaped = false
		case inString && b == '\\':
			escaped = true
		case b == '"':
			inString = !inString
		case !inString && (b == ',' || b == ':'):
			out.WriteByte(' ')
		}
	}
	return out.String()
}

type toolCall struct {
	Function struct {
		Name      string
		Arguments Raw
	}
}

type message struct {
	Role      string
	Content   string
	Thinking  string
	ToolCalls []toolCall
}

type tool struct {
	Type     string
	Function Raw
}

type testCase struct {
	Name     string `json:"name"`
	Template string `json:"template"`
	Rendered string `json:"rendered"`
	Data     struct {
		System     string
		Messages   []*message
		Tools      []tool
		IsThinkSet bool
		Think      bool
	} `json:"data"`
}

func main() {
	file, err := os.ReadFile(os.Args[1])
	if err != nil {
		panic(err)
	}
	var cases []testCase
	if err := json.Unmarshal(file, &cases); err != nil {
		panic(err)
	}
	functions := template.FuncMap{"currentDate": func() string { return "1970-01-01" }}
	failed := 0
	for _, c := range cases {
		parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(c.Template)
		if err != nil {
			fmt.Printf("%s: %v\n", c.Name, err)
			failed++
			continue
		}
		var out bytes.Buffer
		err = parsed.Execute(&out, map[string]any{
			"System":     c.Data.System,
			"Messages":   c.Data.Messages,
			"Tools":      c.Data.Tools,
			"IsThinkSet": c.Data.IsThinkSet,
			"Think":      c.Data.Think,
			"Response":   "",
		})
		if err != nil || out.String() != c.Rendered {
			fmt.Printf("%s: %v\nGo:   %q\nRust: %q\n", c.Name, err, out.String(), c.Rendered)
			failed++
		}
	}
	fmt.Printf("%d cases, %d differ\n", len(cases), failed)
	if failed > 0 || len(cases) == 0 {
		os.Exit(1)
	}
}
