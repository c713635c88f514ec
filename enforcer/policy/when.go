package policy

import (
	"maps"
	"slices"
	"strings"
	"sync"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/ext"
	"go.yaml.in/yaml/v3"

	"klamm/enforcer/policy/strict"
)

// maxCost is what one evaluation of a condition may cost, in units of CEL: about one for each step, and one for ten
// characters looked at. A unit takes up to 1 µs.
const maxCost = 10_000

// condition is a CEL expression over the facts that are known of a subject.
type condition struct {
	text    string
	program cel.Program
	reads   []string // the variables it looks at
	node    *yaml.Node
}

// language is CEL's, with our variables. It is made when the first condition is read.
var language = sync.OnceValues(func() (*cel.Env, error) {
	base, err := newFactTypes()
	if err != nil {
		return nil, err
	}
	options := []cel.EnvOption{
		cel.CustomTypeProvider(base), cel.CustomTypeAdapter(base), cel.ExtendedValidations(),
		cel.CrossTypeNumericComparisons(true), ext.Strings(ext.StringsVersion(4)),
	}
	for name, v := range variables {
		options = append(options, cel.Variable(name, v.is))
	}
	return cel.NewEnv(options...)
})

// UnmarshalYAML compiles the expression.
func (c *condition) UnmarshalYAML(node *yaml.Node) error {
	if err := strict.Node(node, &c.text); err != nil {
		return err
	}
	c.node = node
	if strings.TrimSpace(c.text) == "" {
		return strict.Errorf(node, "the expression is empty: leave the key out")
	}
	env, err := language()
	if err != nil {
		return err
	}
	checked, issues := env.Compile(c.text)
	if issues.Err() != nil {
		errs := make([]error, 0, len(issues.Errors()))
		for _, e := range issues.Errors() {
			errs = append(errs, c.wrong(e))
		}
		return strict.Join(node, errs...)
	}
	if t := checked.OutputType(); !t.IsExactType(cel.BoolType) {
		return strict.Errorf(node, "the expression is of type %s, want bool: compare it with something", cel.FormatCELType(t))
	}
	for _, r := range checked.NativeRep().ReferenceMap() {
		if _, ok := variables[r.Name]; ok && !slices.Contains(c.reads, r.Name) {
			c.reads = append(c.reads, r.Name)
		}
	}
	c.program, err = env.Program(checked, cel.CostLimit(maxCost), cel.EvalOptions(cel.OptOptimize))
	return err
}

// wrong is an error of CEL's, which counts lines from one and columns from zero.
func (c *condition) wrong(e *common.Error) error {
	before := 0
	for i, line := range strings.SplitAfter(c.text, "\n") {
		if i+1 >= e.Location.Line() {
			break
		}
		before += len([]rune(line))
	}
	message, _, _ := strings.Cut(e.Message, " (in container '')")
	if name, ok := strings.CutPrefix(message, "undeclared reference to "); ok {
		message = strict.Unknown("name", strings.Trim(name, "'"), slices.Sorted(maps.Keys(variables)))
	}
	return strict.Within(c.node, before+max(e.Location.Column(), 0), "%s", message)
}

// holds evaluates the condition; no condition holds. An error says that it cannot be told: something it looks at is not
// known, or it costs too much.
func (c *condition) holds(k *known) (bool, error) {
	if c == nil {
		return true, nil
	}
	out, _, err := c.program.Eval(k)
	if err != nil {
		return false, err
	}
	return out == types.True, nil
}
