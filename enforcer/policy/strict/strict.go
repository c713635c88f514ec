// Package strict decodes YAML so that nothing the author wrote is ignored: unknown keys, duplicate keys, keys without a
// value, values of another type, aliases and second documents are errors. Every error names file, line and column, and
// all of them are reported at once.
package strict

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Error is one thing wrong in a file.
type Error struct {
	File    string `json:"file,omitempty"`
	Line    int    `json:"line"`             // from 1
	Column  int    `json:"column,omitempty"` // from 1; 0 where the YAML scanner names the line only
	Message string `json:"message"`

	scalar *yaml.Node // it is inside of this one
	at     int        // so many characters into its value
}

// Error is "file:line:col: message".
func (e Error) Error() string {
	where := e.File
	for _, n := range []int{e.Line, e.Column} {
		if n > 0 {
			where = strings.TrimPrefix(where+":"+strconv.Itoa(n), ":")
		}
	}
	return where + ": " + e.Message
}

// Errors is everything wrong in a file, in the order of the file. Decode returns no other type of error.
type Errors []Error

// Error is one line per error.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i, one := range e {
		lines[i] = one.Error()
	}
	return strings.Join(lines, "\n")
}

// Errorf is an error at a node, to be returned by UnmarshalYAML methods; Decode adds the file.
func Errorf(node *yaml.Node, format string, args ...any) Error {
	return Error{Line: node.Line, Column: node.Column, Message: fmt.Sprintf(format, args...)}
}

// Join is several errors as one, nil when none is left; errors without a position get the node's.
func Join(node *yaml.Node, errs ...error) error {
	all := make(Errors, 0, len(errs))
	for _, err := range errs {
		all = append(all, positioned(node, err)...)
	}
	if len(all) == 0 {
		return nil
	}
	return all
}

func positioned(node *yaml.Node, err error) Errors {
	var one Error
	var many Errors
	switch {
	case err == nil:
		return nil
	case errors.As(err, &many):
		return many
	case errors.As(err, &one):
		return Errors{one}
	default:
		return Errors{Errorf(node, "%s", err)}
	}
}

// At is a value that remembers where it stands, for checks that need more than one value.
type At[T any] struct {
	V    T
	Node *yaml.Node // nil when the key is absent
}

// UnmarshalYAML keeps the node beside its value.
func (a *At[T]) UnmarshalYAML(node *yaml.Node) error {
	a.Node = node
	return Node(node, &a.V)
}

// Decode reads the one YAML document in data into out, a pointer to a struct.
//
// Keys are the fields' `yaml:"name"` tags ("-" hides a field, ",inline" lifts the keys of a struct); a field tagged
// `strict:"required"` must be there. Beside structs, pointers, slices, maps with string keys, strings, booleans,
// numbers and time.Duration, a type decodes itself by UnmarshalYAML(*yaml.Node) error or by encoding.TextUnmarshaler;
// there, Errorf and Within give an error its position and Node decodes a part with the same strictness.
//
// The error is an Errors. On error out is partly filled and must not be used.
func Decode(file string, data []byte, out any) error {
	errs := decodeDocument(data, out)
	if len(errs) == 0 {
		return nil
	}
	for i := range errs {
		errs[i].File = file
		errs[i].locate(data)
	}
	slices.SortStableFunc(errs, func(a, b Error) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return errs
}

func decodeDocument(data []byte, out any) Errors {
	var doc, extra yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&doc); err != nil {
		return syntaxError(err)
	}
	root := doc.Content[0]
	if root.ShortTag() == "!!null" {
		return Errors{{Line: 1, Message: "the file is empty"}}
	}
	var errs Errors
	if err := dec.Decode(&extra); err == nil {
		errs = append(errs, Errorf(&extra, "a second YAML document: a file holds one, put the other into a file of its own"))
	} else if !errors.Is(err, io.EOF) {
		errs = syntaxError(err)
	}
	return append(errs, positioned(root, Node(root, out))...)
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// syntaxError takes the line out of the scanner's text, which is the only place it is in.
func syntaxError(err error) Errors {
	if errors.Is(err, io.EOF) {
		return Errors{{Line: 1, Message: "the file is empty"}}
	}
	e := Error{Line: 1, Message: yamlLine.ReplaceAllString(err.Error(), "")}
	if m := yamlLine.FindStringSubmatch(err.Error()); m != nil && m[1] != "" {
		e.Line, _ = strconv.Atoi(m[1]) // digits by the expression; more of them than an int holds leave its maximum
	}
	e.Message = "not YAML: " + e.Message
	return Errors{e}
}
