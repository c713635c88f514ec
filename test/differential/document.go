package main

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/kafka/authz"
)

const (
	reportFile   = "report.yaml"
	documentFile = "../../docs/kafka-compatibility.md"
)

// report is what a whole run has found, as it is kept.
type report struct {
	Kafka  []string // releases, newest first
	Passed int
	APIs   map[string]*measured
}

// measured is what a run has found of an API.
type measured struct {
	Versions string         // of the version table
	Spoken   []string       // by each release; empty: none
	Answers  map[string]int // that were compared, by class, over all versions
}

func (s *suite) report(releases []string) *report {
	r := &report{Kafka: releases, Passed: s.passed, APIs: map[string]*measured{}}
	for key := range int16(kmsg.MaxKey + 1) {
		row := authz.Table[key]
		if row.Decide == nil {
			continue
		}
		m := &measured{Versions: versionsOf(row), Answers: map[string]int{}}
		for _, release := range releases {
			text := ""
			if spoken, is := s.spoken[release][key]; is {
				text = spoken.within(row).String()
			}
			m.Spoken = append(m.Spoken, text)
		}
		for v := row.Min; v <= row.Max; v++ {
			for class, n := range s.coverage[cell{key, v}] {
				m.Answers[class] += n
			}
		}
		r.APIs[kmsg.NameForKey(key)] = m
	}
	return r
}

func versionsOf(row authz.API) string { return versionRange{row.Min, row.Max}.String() }

func (r versionRange) String() string {
	switch {
	case r.max < r.min:
		return ""
	case r.max == r.min:
		return fmt.Sprint(r.min)
	default:
		return fmt.Sprintf("%d-%d", r.min, r.max)
	}
}

func (r *report) write() error {
	var text bytes.Buffer
	text.WriteString("# What the last whole run of make verify-fidelity found: go run ./test/differential -report\n")
	enc := yaml.NewEncoder(&text)
	enc.SetIndent(2)
	if err := enc.Encode(r); err != nil {
		return err
	}
	return os.WriteFile(reportFile, text.Bytes(), 0o644)
}

func readReport() (*report, error) {
	r := &report{}
	return r, readStrictly(reportFile, r)
}

// document is docs/kafka-compatibility.md.
func (r *report) document() (string, error) {
	differences, err := readDifferences("differences.yaml")
	if err != nil {
		return "", err
	}
	var s strings.Builder
	fmt.Fprintf(&s, documentHead, strings.Join(r.Kafka, " and "), r.Passed)
	fmt.Fprintf(&s, "| API | key | versions | %s | a client must be allowed | answers compared |\n",
		strings.Join(prefixed("Kafka ", r.Kafka), " | "))
	fmt.Fprintf(&s, "| --- | --- | --- |%s --- | --- |\n", strings.Repeat(" --- |", len(r.Kafka)))
	for key := range int16(kmsg.MaxKey + 1) {
		row, name := authz.Table[key], kmsg.NameForKey(key)
		if row.Decide == nil {
			continue
		}
		m := r.APIs[name]
		if m == nil || m.Versions != versionsOf(row) {
			return "", fmt.Errorf("%s: the report is of another version table: go run ./test/differential -report", name)
		}
		fmt.Fprintf(&s, "| %s | %d | %s |", name, key, m.Versions)
		for _, spoken := range m.Spoken {
			if spoken == "" {
				spoken = "–"
			}
			fmt.Fprintf(&s, " %s |", spoken)
		}
		fmt.Fprintf(&s, " %s | %s |\n", authz.Requirements[kmsg.Key(key)], m.summary())
	}
	s.WriteString(documentRefused)
	for key := range int16(kmsg.MaxKey + 1) {
		if why := authz.Refused[kmsg.Key(key)]; why != "" {
			fmt.Fprintf(&s, "| %s | %d | %s |\n", kmsg.NameForKey(key), key, why)
		}
	}
	s.WriteString(documentDifferences)
	for _, d := range differences {
		what := strings.Join(d.Fields, ", ")
		if d.Scenario != "" {
			api, sentence, _ := strings.Cut(d.Scenario, "/")
			what = fmt.Sprintf("%s, %s: %s, klamm %s", api, strings.ReplaceAll(sentence, "-", " "), d.Codes[0], d.Codes[1])
		}
		fmt.Fprintf(&s, "| %s | %s |\n", what, d.Reason)
	}
	s.WriteString(documentOthers)
	s.WriteString(documentMasked)
	for _, field := range slices.Sorted(maps.Keys(volatile)) {
		fmt.Fprintf(&s, "| %s | %s |\n", strings.TrimPrefix(field, "*."), volatile[field])
	}
	return s.String(), nil
}

// summary are the counts of the classes that say most.
func (m *measured) summary() string {
	var parts []string
	for _, class := range classes {
		if n := m.Answers[class]; n > 0 {
			parts = append(parts, fmt.Sprintf("%s %d", class, n))
		}
	}
	if parts == nil {
		return "none: no broker here speaks it"
	}
	return strings.Join(parts, ", ")
}

func prefixed(prefix string, all []string) (out []string) {
	for _, s := range all {
		out = append(out, prefix+s)
	}
	return out
}

const documentHead = `# Kafka compatibility

A client cannot tell whether a broker with ACLs refused it or klamm did, but in the cases listed here. This page is made
by ` + "`go run ./test/differential -doc`" + ` from the version table and the last whole run of
` + "`make verify-fidelity`" + `.

That run asks two clusters the same requests: one with StandardAuthorizer and ACLs (ALLOW and DENY; literal, prefixed
and wildcard names; bound to hosts) directly, and one without an authorizer through a node whose policy
` + "`klamm policy import-acls`" + ` made from the same ACLs. Their answers are compared field by field, on Kafka %s:
%d plays of scenarios and random requests, all alike but for the [differences](#deliberate-differences) below.

## APIs

Versions are those klamm speaks: none that Kafka 4.0 has dropped (KIP-896), also before older brokers. Of what a client
asks for, it is shown what the broker speaks too. Where the columns of Kafka have fewer, that release has fewer.
Compared answers are counted by what came of them (allowed, partly refused, denied) and by what was asked (by name, by
topic id, an unknown topic, an empty list, a null one).

`

const documentRefused = `
## APIs that clients do not see

They are left out of ApiVersions and refused with UNSUPPORTED_VERSION: who speaks them is no client.

| API | key | why |
| --- | --- | --- |
`

const documentDifferences = `
## Deliberate differences

Texts, and error codes in cases that the run asks one by one. The name or id of what a refusal is about never differs.

| what | why it differs |
| --- | --- |
`

const documentOthers = `
What the run does not ask, because brokers give no answer or another each time:

- DescribeUserScramCredentials of all users (null) by somebody who may not: brokers fail and never answer. klamm
  refuses it.
- DescribeDelegationToken before version 3 does not tell who asked for a token. Who did, and is neither its owner nor a
  renewer, does not see it there. A client that logged in by a token hears ANONYMOUS as its name in a refusal.
`

const documentMasked = `
## What the comparison does not look at

Of these fields only the sign of a number is compared, and of others whether there is a value: two brokers differ in
them too.

| field | why |
| --- | --- |
`

func writeDocument() error {
	r, err := readReport()
	if err != nil {
		return err
	}
	text, err := r.document()
	if err != nil {
		return err
	}
	return os.WriteFile(documentFile, []byte(text), 0o644)
}
