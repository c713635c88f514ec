package strict

import (
	"errors"
	"regexp"
	"strings"
	"testing"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// marked is a text in which every X is wrong.
type marked struct{}

func (*marked) UnmarshalYAML(node *yaml.Node) error {
	var errs []error
	for i, r := range []rune(node.Value) {
		if r == 'X' {
			errs = append(errs, Within(node, i, "an X"))
		}
	}
	return Join(node, errs...)
}

func TestAnErrorInsideAValueIsSaidWithItsPositionInTheFile(t *testing.T) {
	for name, in := range map[string]string{
		"a plain word":                     "text: X",
		"plain words":                      "text: a bX",
		"plain words over lines":           "text: a\n  b\n\n\n   c X\n  d",
		"a single-quoted word":             "text: 'a''''X'",
		"single quotes over lines":         "text: 'a\n  b X\n\n  X'",
		"a double-quoted word":             `text: "a\"bX"`,
		"double quotes over lines":         "text: \"a \\\n  b\\\n   X\n\n X\"",
		"escapes for white space":          `text: "a\n\tb\ \N\_\L\Pc X"`,
		"escapes with numbers":             `text: "\x41\u00e9\x20\U0001f600\\X"`,
		"escapes of other characters":      `text: "\e \" \\ X"`,
		"characters of several bytes":      "text: 'ä€😀X'",
		"a literal block":                  "text: |\n  a\n  b X\n\n    c X\n",
		"a literal block that is kept":     "text: |2+ # an X in a comment\n\n   a\n  X\n\n",
		"a folded block":                   "text: >-\n   a\n   b\n\n   c X\n   X\n",
		"a value with an anchor":           "text: &a X",
		"a value with a tag":               "text: !!str 'a X'",
		"a value with a tag and a block":   "text: !!str\n  |\n  a X",
		"a value in braces":                "{text: a X, other: 1}",
		"lines that end as in Windows":     "text: |\r\n  a\r\n  b X\r\n",
		"a file with a byte order mark":    "\ufefftext: a X",
		"a value in the next line":         "text:\n  a\n  X",
		"a key of several bytes before it": "{ä: 1, text: X}",
	} {
		t.Run(name, func(t *testing.T) {
			var out struct {
				Text  marked `yaml:"text"`
				Other int    `yaml:"other"`
				Ä     int    `yaml:"ä"`
			}
			err := Decode("f", []byte(in), &out)
			var errs Errors
			if !errors.As(err, &errs) {
				t.Fatalf("%v", err)
			}
			lines := strings.Split(strings.TrimPrefix(in, "\ufeff"), "\n")
			seen := map[Error]bool{}
			for _, e := range errs {
				if seen[e] {
					t.Errorf("%s twice", e)
				}
				seen[e] = true
				line := []rune(lines[e.Line-1])
				if e.Message != "an X" || len(line) < e.Column || line[e.Column-1] != 'X' {
					t.Errorf("%s in\n%s", e, in)
				}
			}
		})
	}
}

// spelled reports every character of a text but white space, as itself.
type spelled struct{}

func (*spelled) UnmarshalYAML(node *yaml.Node) error {
	var errs []error
	for i, r := range []rune(node.Value) {
		if !unicode.IsSpace(r) {
			errs = append(errs, Within(node, i, "%c", r))
		}
	}
	return Join(node, errs...)
}

func FuzzEveryCharacterIsFound(f *testing.F) {
	for _, seed := range []string{
		"a b", "'a''b'", "\"a\\\"\\x41\\\n  b\"", "|2\n  a\n\n  b", ">\n a\n b", "!!str a", "&a 'b'", "\ufeffa: b", "[a, b]",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		if len(value) > 1000 {
			return // each error is found from the beginning
		}
		file := "text: " + value
		var errs Errors
		if err := Decode("f", []byte(file), &struct{ Text spelled }{}); !errors.As(err, &errs) {
			return
		}
		lines := regexp.MustCompile("\r\n|["+lineBreaks+"]").Split(file, -1)
		for _, e := range errs {
			if len([]rune(e.Message)) != 1 {
				return // of the YAML, not of the text
			}
			line := []rune(lines[e.Line-1])
			if len(line) < e.Column {
				t.Fatalf("%s in %q", e, file)
			}
			if at := string(line[e.Column-1]); at != e.Message && at != `\` {
				t.Fatalf("%s is at %q in %q", e, at, file)
			}
		}
	})
}
