package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/policy"
	"klamm/enforcer/policy/strict"
	"klamm/spiffe"
)

// givenFacts is what conditions look at, by the names they have there. What is left out is not known.
type givenFacts struct {
	Claims   givenClaims `yaml:"claims"`
	Identity struct {
		Source string `yaml:"source"`
		Rule   string `yaml:"rule"`
	} `yaml:"identity"`
	Sources map[string]givenEvidence `yaml:"sources"`
	SASL    struct {
		Mechanism string      `yaml:"mechanism"`
		Issuer    string      `yaml:"issuer"`
		Claims    givenClaims `yaml:"claims"`
	} `yaml:"sasl"`
	TLS *struct {
		Subject string `yaml:"subject"`
		Issuer  string `yaml:"issuer"`
	} `yaml:"tls"`
	Process givenProcess `yaml:"process"`
	Pod     struct {
		Namespace string `yaml:"namespace"`
		Name      string `yaml:"name"`
		Container string `yaml:"container"`
		UID       string `yaml:"uid"`
	} `yaml:"pod"`
}

type givenProcess struct {
	Exe       string  `yaml:"exe"`
	ExeSHA256 string  `yaml:"exe_sha256"`
	Comm      string  `yaml:"comm"`
	UID       *uint32 `yaml:"uid"`
	GID       *uint32 `yaml:"gid"`
	Cgroup    string  `yaml:"cgroup"`
	Unit      string  `yaml:"unit"`
}

// UnmarshalYAML wants both ids or none, as the kernel has it.
func (p *givenProcess) UnmarshalYAML(node *yaml.Node) error {
	type plain givenProcess
	if err := strict.Node(node, (*plain)(p)); err != nil {
		return err
	}
	if (p.UID == nil) != (p.GID == nil) {
		return strict.Errorf(node, "want both of uid and gid, or none")
	}
	return nil
}

type givenEvidence struct {
	SPIFFEID givenID     `yaml:"spiffe_id"`
	Rule     string      `yaml:"rule"`
	Issuer   string      `yaml:"issuer"`
	Subject  string      `yaml:"subject"`
	Hint     string      `yaml:"hint"`
	Claims   givenClaims `yaml:"claims"`
}

type givenID struct{ spiffeid.ID }

// UnmarshalText reads a SPIFFE ID.
func (id *givenID) UnmarshalText(text []byte) (err error) {
	id.ID, err = spiffeid.FromString(string(text))
	return err
}

// givenClaims are as the JSON of a token gives them.
type givenClaims map[string]any

// UnmarshalYAML reads a mapping.
func (c *givenClaims) UnmarshalYAML(node *yaml.Node) error {
	if node.ShortTag() != "!!map" {
		return strict.Errorf(node, "want a mapping of claims")
	}
	var claims any
	if err := node.Decode(&claims); err != nil {
		return strict.Errorf(node, "%s", err)
	}
	text, err := json.Marshal(claims)
	if err != nil {
		return strict.Errorf(node, "no claims of a token: %s", err)
	}
	return json.Unmarshal(text, c)
}

// readFacts reads the files of --facts and --claims, "-" is standard input; without either nothing is known.
func (f *explainFlags) readFacts(in io.Reader) (*policy.Facts, error) {
	if f.facts == "-" && f.claims == "-" {
		return nil, errors.New("--facts and --claims: only one of them can be standard input")
	}
	var given givenFacts
	if err := readGiven("--facts", f.facts, in, &given); err != nil {
		return nil, err
	}
	if err := readGiven("--claims", f.claims, in, &given.Claims); err != nil {
		return nil, err
	}
	facts := given.facts()
	facts.SASL.Principal = f.principal
	if f.source == "" {
		return facts, nil
	}
	facts.Identity.Source = f.source
	if _, ok := given.Sources[f.source]; !ok {
		e := spiffe.Evidence{Source: f.source, Claims: given.Claims}
		e.Issuer, _ = given.Claims["iss"].(string)
		e.Subject, _ = given.Claims["sub"].(string)
		facts.Identity.Evidence = append(facts.Identity.Evidence, e)
	}
	return facts, nil
}

// readGiven reads the file of a flag, if one is given.
func readGiven(flag, file string, in io.Reader, out any) error {
	if file == "" {
		return nil
	}
	read := func() ([]byte, error) { return os.ReadFile(file) }
	if file == "-" {
		read = func() ([]byte, error) { return io.ReadAll(in) }
	}
	data, err := read()
	if err != nil {
		return fmt.Errorf("%s: %w", flag, err)
	}
	return strict.Decode(file, data, out)
}

func (g *givenFacts) facts() *policy.Facts {
	identity := &spiffe.Identity{
		Source: g.Identity.Source, Rule: g.Identity.Rule, Claims: g.Claims,
		Process: spiffe.Process{
			Exe: g.Process.Exe, ExeSHA256: g.Process.ExeSHA256, Comm: g.Process.Comm, Cgroup: g.Process.Cgroup,
			Unit: g.Process.Unit, PodUID: g.Pod.UID, Namespace: g.Pod.Namespace, Pod: g.Pod.Name, Container: g.Pod.Container,
		},
	}
	if g.Process.UID != nil {
		identity.Process.PID, identity.Process.UID, identity.Process.GID = 1, *g.Process.UID, *g.Process.GID
	}
	for _, source := range slices.Sorted(maps.Keys(g.Sources)) {
		e := g.Sources[source]
		identity.Evidence = append(identity.Evidence, spiffe.Evidence{Source: source, ID: e.SPIFFEID.ID, Rule: e.Rule,
			Issuer: e.Issuer, Subject: e.Subject, Hint: e.Hint, Claims: e.Claims})
	}
	if g.TLS != nil {
		identity.Evidence = append(identity.Evidence,
			spiffe.Evidence{Source: spiffe.SourceTLS, Subject: g.TLS.Subject, Issuer: g.TLS.Issuer})
	}
	facts := &policy.Facts{Identity: identity, SASL: policy.SASL{Mechanism: g.SASL.Mechanism}}
	if g.SASL.Claims != nil || g.SASL.Issuer != "" {
		facts.SASL.Token = &spiffe.Evidence{Source: spiffe.SourceSASL, Issuer: g.SASL.Issuer, Claims: g.SASL.Claims}
	}
	return facts
}
