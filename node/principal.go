package node

import (
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// mapping are Kafka's ssl.principal.mapping.rules (KIP-371).
type mapping []mappingRule

// mappingRule makes a name of a subject that its pattern matches as a whole; nil takes the subject as it is.
type mappingRule struct {
	pattern     *regexp.Regexp
	replacement string
	change      func(string) string
}

var errNoRule = errors.New("no rule of ssl.principal.mapping.rules matches")

// parseMapping reads rules as Kafka's SslPrincipalMapper does. Java's patterns that Go does not have are an error.
func parseMapping(text string) (mapping, error) {
	var rules mapping
	for text = strings.TrimLeft(text, " \t\r\n,"); text != ""; text = strings.TrimLeft(text, " \t\r\n,") {
		if rest, is := strings.CutPrefix(text, "DEFAULT"); is {
			rules, text = append(rules, mappingRule{}), rest
			continue
		}
		rest, is := strings.CutPrefix(text, "RULE:")
		pattern, rest, closed := cutSlash(rest)
		replacement, rest, ended := cutSlash(rest)
		if !is || !closed || !ended {
			return nil, fmt.Errorf("%.60q is not DEFAULT or RULE:pattern/replacement/", text)
		}
		r := mappingRule{replacement: group.ReplaceAllString(replacement, "$${$1}"),
			change: func(s string) string { return s }}
		var err error
		if r.pattern, err = regexp.Compile(`^(?:` + pattern + `)$`); err != nil {
			return nil, err
		}
		switch {
		case strings.HasPrefix(rest, "L"):
			r.change, rest = strings.ToLower, rest[1:]
		case strings.HasPrefix(rest, "U"):
			r.change, rest = strings.ToUpper, rest[1:]
		}
		rules, text = append(rules, r), rest
	}
	return rules, nil
}

// group is Java's reference to a group, which Go would take for a longer name.
var group = regexp.MustCompile(`\$(\d)`)

// cutSlash cuts around the first slash that no backslash precedes.
func cutSlash(s string) (before, after string, found bool) {
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case '/':
			return s[:i], s[i+1:], true
		}
	}
	return s, "", false
}

// principal is how a broker with these rules knows a certificate of this subject, without "User:".
func (m mapping) principal(subject string) (string, error) {
	if len(m) == 0 {
		return subject, nil
	}
	for _, r := range m {
		switch {
		case r.pattern == nil:
			return subject, nil
		case r.pattern.MatchString(subject):
			return r.change(r.pattern.ReplaceAllString(subject, r.replacement)), nil
		}
	}
	return "", fmt.Errorf("%w %q", errNoRule, subject)
}

// unnamed is the subject of every X509-SVID of SPIRE's whose entry has no DNS name.
var unnamed = pkix.Name{Organization: []string{"SPIRE"}, Country: []string{"US"}}.String()
