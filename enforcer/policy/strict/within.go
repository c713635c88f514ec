package strict

import (
	"slices"
	"strconv"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// Within is an error inside a scalar's value, at characters (runes) into it, to be returned by UnmarshalYAML methods of
// types that hold a language of their own. Decode finds its place in the file, whatever the style of the scalar.
func Within(node *yaml.Node, at int, format string, args ...any) Error {
	e := Errorf(node, format, args...)
	e.scalar, e.at = node, at
	return e
}

// locate sets line and column of an error inside a scalar. Where the file is not as expected it stays at the scalar.
func (e *Error) locate(file []byte) {
	if e.scalar == nil {
		return
	}
	s := source{text: []rune(strings.TrimPrefix(string(file), "\ufeff")), style: e.scalar.Style, line: 1, column: 1}
	if s.seek(e.scalar) && s.pass([]rune(e.scalar.Value), e.at) {
		e.Line, e.Column = s.line, s.column
	}
	e.scalar = nil
}

// source is the text of a file, read as the content of one scalar.
type source struct {
	text         []rune // what is left
	style        yaml.Style
	line, column int // of its first character
}

// skip counts lines as YAML does.
func (s *source) skip(n int) {
	for i, r := range s.text[:n] {
		s.column++
		switch {
		case r == '\r' && i+1 < len(s.text) && s.text[i+1] == '\n':
		case strings.ContainsRune(lineBreaks, r):
			s.line, s.column = s.line+1, 1
		}
	}
	s.text = s.text[n:]
}

func (s *source) skipUntil(f func(rune) bool) {
	n := slices.IndexFunc(s.text, f)
	if n < 0 {
		n = len(s.text)
	}
	s.skip(n)
}

const lineBreaks = "\r\n\u0085\u2028\u2029"

func notSpace(r rune) bool { return !unicode.IsSpace(r) }

// seek goes to where the content of the scalar begins: behind its tag or anchor, opening quote or block header.
func (s *source) seek(node *yaml.Node) bool {
	for s.line < node.Line || s.line == node.Line && s.column < node.Column {
		if len(s.text) == 0 {
			return false
		}
		s.skip(1)
	}
	for len(s.text) > 0 && (s.text[0] == '!' || s.text[0] == '&') {
		if s.text[0] == '!' {
			s.skipUntil(unicode.IsSpace)
		} else {
			s.skip(1 + len(node.Anchor))
		}
		s.skipUntil(notSpace)
	}
	switch {
	case s.style&(yaml.LiteralStyle|yaml.FoldedStyle) != 0:
		s.skipUntil(func(r rune) bool { return strings.ContainsRune(lineBreaks, r) })
	case s.style&(yaml.DoubleQuotedStyle|yaml.SingleQuotedStyle) != 0 && len(s.text) > 0:
		s.skip(1)
	}
	return true
}

// pass goes over the first n characters of the value. White space is no measure: lines are folded and indented.
func (s *source) pass(value []rune, n int) bool {
	for i, r := range value {
		if unicode.IsSpace(r) {
			continue
		}
		width, is := s.next()
		for width > 0 && unicode.IsSpace(is) {
			s.skip(width)
			width, is = s.next()
		}
		if i >= n || width == 0 {
			return width > 0
		}
		s.skip(width)
	}
	return true
}

// escapes of double-quoted scalars that stand for white space, and the lengths of those with a number.
var (
	spaces = map[rune]bool{'n': true, 't': true, 'r': true, 'v': true, 'f': true, ' ': true, '\t': true, '\n': true,
		'N': true, '_': true, 'L': true, 'P': true}
	digits = map[rune]int{'x': 2, 'u': 4, 'U': 8}
)

// next is the character of the value that comes next, and how many stand for it in the file; 0 at the end.
func (s *source) next() (width int, is rune) {
	switch {
	case len(s.text) == 0:
		return 0, 0
	case len(s.text) == 1:
		return 1, s.text[0]
	case s.style&yaml.SingleQuotedStyle != 0 && s.text[0] == '\'' && s.text[1] == '\'':
		return 2, '\''
	case s.style&yaml.DoubleQuotedStyle == 0 || s.text[0] != '\\':
		return 1, s.text[0]
	case spaces[s.text[1]]:
		return 2, ' '
	}
	n := digits[s.text[1]]
	if n == 0 || len(s.text) < 2+n {
		return 2, s.text[1]
	}
	code, err := strconv.ParseUint(string(s.text[2:2+n]), 16, 32)
	if err != nil {
		return 0, 0
	}
	return 2 + n, rune(code)
}
