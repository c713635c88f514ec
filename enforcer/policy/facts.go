package policy

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"

	"klamm/spiffe"
)

// variables are what conditions can look at, with their values: nil is not known. docs/policy.md documents them; a
// name, once there, stays.
var variables = map[string]struct {
	is    *cel.Type
	value func(*Subject) any
}{
	"cluster":   {cel.StringType, func(s *Subject) any { return s.Cluster }},
	"host":      {cel.StringType, hostOf},
	"spiffe_id": {cel.StringType, func(s *Subject) any { return orUnknown(s.SPIFFE) }},
	"claims":    {claimsType, func(s *Subject) any { return claimsOf(s.identity().Claims) }},
	"identity":  {identityType, identityOf},
	"sources":   {cel.MapType(cel.StringType, evidenceType), sourcesOf},
	"evidence":  {cel.ListType(evidenceType), evidenceOf},
	"sasl":      {saslType, saslOf},
	"tls":       {tlsType, tlsOf},
	"process":   {processType, processOf},
	"pod":       {podType, podOf},
}

const typePrefix = "klamm."

var (
	claimsType   = cel.MapType(cel.StringType, cel.DynType)
	identityType = cel.ObjectType(typePrefix + "Identity")
	evidenceType = cel.ObjectType(typePrefix + "Evidence")
	saslType     = cel.ObjectType(typePrefix + "SASL")
	tlsType      = cel.ObjectType(typePrefix + "TLS")
	processType  = cel.ObjectType(typePrefix + "Process")
	podType      = cel.ObjectType(typePrefix + "Pod")
)

// fields of the types. A field that is not known is an error to use; has() tells.
var fields = map[*cel.Type]map[string]*cel.Type{
	identityType: {"spiffe_id": cel.StringType, "source": cel.StringType, "rule": cel.StringType},
	evidenceType: {
		"source": cel.StringType, "spiffe_id": cel.StringType, "rule": cel.StringType, "issuer": cel.StringType,
		"subject": cel.StringType, "hint": cel.StringType, "claims": claimsType,
	},
	saslType: {
		"mechanism": cel.StringType, "principal": cel.StringType, "issuer": cel.StringType, "claims": claimsType,
	},
	tlsType: {"subject": cel.StringType, "issuer": cel.StringType},
	processType: {
		"exe": cel.StringType, "exe_sha256": cel.StringType, "comm": cel.StringType, "uid": cel.IntType, "gid": cel.IntType,
		"cgroup": cel.StringType, "unit": cel.StringType,
	},
	podType: {
		"namespace": cel.StringType, "name": cel.StringType, "container": cel.StringType, "uid": cel.StringType,
	},
}

// factTypes tells CEL about the types above.
type factTypes struct {
	*types.Registry
	byName map[string]*cel.Type
}

func newFactTypes() (*factTypes, error) {
	registry, err := types.NewRegistry()
	t := &factTypes{registry, map[string]*cel.Type{}}
	for of := range fields {
		t.byName[of.TypeName()] = of
	}
	return t, err
}

// FindStructType is of types.Provider.
func (t *factTypes) FindStructType(name string) (*types.Type, bool) {
	if of, ok := t.byName[name]; ok {
		return types.NewTypeTypeWithParam(of), true
	}
	return t.Registry.FindStructType(name)
}

// FindStructFieldNames is of types.Provider.
func (t *factTypes) FindStructFieldNames(name string) ([]string, bool) {
	if of, ok := t.byName[name]; ok {
		return slices.Sorted(maps.Keys(fields[of])), true
	}
	return t.Registry.FindStructFieldNames(name)
}

// FindStructFieldType is of types.Provider.
func (t *factTypes) FindStructFieldType(name, field string) (*types.FieldType, bool) {
	of, ok := t.byName[name]
	if !ok {
		return t.Registry.FindStructFieldType(name, field)
	}
	is, ok := fields[of][field]
	return &types.FieldType{
		Type:    is,
		IsSet:   func(target any) bool { return target.(*object).fields[field] != nil },
		GetFrom: func(target any) (any, error) { return target.(*object).get(field) },
	}, ok
}

// object is a value of one of the types, a ref.Val.
type object struct {
	of     *cel.Type
	fields map[string]any // those that are known
}

func (o *object) get(field string) (any, error) {
	v, ok := o.fields[field]
	if !ok {
		return nil, notKnown(o.name() + "." + field)
	}
	return v, nil
}

// name is that of the variable, or what stands for it.
func (o *object) name() string {
	return strings.ToLower(strings.TrimPrefix(o.of.TypeName(), typePrefix))
}

func notKnown(what string) error { return fmt.Errorf("%s is not known", what) }

// Get is of traits.Indexer.
func (o *object) Get(index ref.Val) ref.Val {
	field, _ := index.Value().(string)
	v, err := o.get(field)
	if err != nil {
		return types.WrapErr(err)
	}
	return types.DefaultTypeAdapter.NativeToValue(v)
}

// IsSet is of traits.FieldTester.
func (o *object) IsSet(index ref.Val) ref.Val {
	field, _ := index.Value().(string)
	return types.Bool(o.fields[field] != nil)
}

// ConvertToNative is of ref.Val.
func (o *object) ConvertToNative(t reflect.Type) (any, error) {
	return nil, fmt.Errorf("a %s is no %s", o.of.TypeName(), t)
}

// ConvertToType is of ref.Val.
func (o *object) ConvertToType(t ref.Type) ref.Val {
	if t == types.TypeType {
		return o.of
	}
	return types.NewErr("a %s is no %s", o.of.TypeName(), t.TypeName())
}

// Equal is of ref.Val.
func (o *object) Equal(other ref.Val) ref.Val {
	p, ok := other.(*object)
	return types.Bool(ok && o.of == p.of && reflect.DeepEqual(o.fields, p.fields))
}

// Type is of ref.Val.
func (o *object) Type() ref.Type { return o.of }

// Value is of ref.Val.
func (o *object) Value() any { return o }

// known is all that is known of one subject, for any number of conditions. It is a cel.Activation.
type known struct {
	subject *Subject
	values  map[string]any // of the variables asked for until now
}

func newKnown(s *Subject) *known { return &known{s, map[string]any{}} }

// ResolveName is of cel.Activation.
func (k *known) ResolveName(name string) (any, bool) {
	if v, ok := k.values[name]; ok {
		return v, true
	}
	variable, ok := variables[name]
	if !ok {
		return nil, false
	}
	v := variable.value(k.subject)
	if v == nil {
		v = types.WrapErr(notKnown(name))
	}
	k.values[name] = v
	return v, true
}

// Parent is of cel.Activation.
func (k *known) Parent() cel.Activation { return nil }

func hostOf(s *Subject) any {
	if !s.Host.IsValid() {
		return nil
	}
	return s.Host.Unmap().WithZone("").String()
}

func identityOf(s *Subject) any {
	return newObject(identityType, map[string]any{
		"spiffe_id": orUnknown(s.SPIFFE), "source": orUnknown(s.identity().Source), "rule": orUnknown(s.identity().Rule),
	})
}

// evidence is all there is on the subject, that of its login the last.
func (s *Subject) evidence() []spiffe.Evidence {
	all := slices.Clip(s.identity().Evidence)
	if token := s.login().Token; token != nil {
		all = append(all, *token)
	}
	return all
}

func evidenceOf(s *Subject) any {
	var all []ref.Val
	for _, e := range s.evidence() {
		all = append(all, evidenceObject(e))
	}
	return all
}

func sourcesOf(s *Subject) any {
	first := map[string]any{}
	for _, e := range s.evidence() {
		if _, later := first[e.Source]; !later {
			first[e.Source] = evidenceObject(e)
		}
	}
	return first
}

func evidenceObject(e spiffe.Evidence) *object {
	id := ""
	if !e.ID.IsZero() {
		id = e.ID.String()
	}
	return newObject(evidenceType, map[string]any{
		"source": orUnknown(e.Source), "spiffe_id": orUnknown(id), "rule": orUnknown(e.Rule),
		"issuer": orUnknown(e.Issuer), "subject": orUnknown(e.Subject), "hint": orUnknown(e.Hint),
		"claims": claimsOf(e.Claims),
	})
}

func saslOf(s *Subject) any {
	token := cmp.Or(s.login().Token, &spiffe.Evidence{})
	return newObject(saslType, map[string]any{
		"mechanism": orUnknown(s.login().Mechanism), "principal": orUnknown(s.Principal),
		"issuer": orUnknown(token.Issuer), "claims": claimsOf(token.Claims),
	})
}

func tlsOf(s *Subject) any {
	for _, e := range s.evidence() {
		if e.Source == spiffe.SourceTLS {
			return newObject(tlsType, map[string]any{"subject": orUnknown(e.Subject), "issuer": orUnknown(e.Issuer)})
		}
	}
	return newObject(tlsType, nil)
}

func processOf(s *Subject) any {
	p := s.identity().Process
	o := newObject(processType, map[string]any{
		"exe": orUnknown(p.Exe), "exe_sha256": orUnknown(p.ExeSHA256), "comm": orUnknown(p.Comm),
		"cgroup": orUnknown(p.Cgroup), "unit": orUnknown(p.Unit),
	})
	if p.PID != 0 {
		o.fields["uid"], o.fields["gid"] = int64(p.UID), int64(p.GID)
	}
	return o
}

func podOf(s *Subject) any {
	p := s.identity().Process
	return newObject(podType, map[string]any{
		"namespace": orUnknown(p.Namespace), "name": orUnknown(p.Pod), "container": orUnknown(p.Container),
		"uid": orUnknown(p.PodUID),
	})
}

func (s *Subject) identity() *spiffe.Identity {
	if s.Facts == nil || s.Facts.Identity == nil {
		return &spiffe.Identity{}
	}
	return s.Facts.Identity
}

func (s *Subject) login() SASL {
	if s.Facts == nil {
		return SASL{}
	}
	return s.Facts.SASL
}

// orUnknown is nil for the empty text.
func orUnknown(text string) any {
	if text == "" {
		return nil
	}
	return text
}

// claimsOf is an empty map where there are none, so that has() can look into it.
func claimsOf(claims map[string]any) map[string]any {
	if claims == nil {
		return map[string]any{}
	}
	return claims
}

// newObject leaves out what is not known.
func newObject(of *cel.Type, values map[string]any) *object {
	maps.DeleteFunc(values, func(_ string, v any) bool { return v == nil })
	return &object{of, values}
}
