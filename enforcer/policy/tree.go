package policy

import (
	"cmp"
	"slices"
	"strings"

	"github.com/twmb/franz-go/pkg/kmsg"
)

// tree is a radix tree over the patterns of one resource type. All that applies to a name is decided while it is built:
// each node carries the outcome for the name that ends there and for the names that go on without another node, so that
// a look-up is one walk and one load.
//
// Nodes are small and their text stands together, because a look-up in a large tree costs what it misses in the cache.
type tree struct {
	nodes []node // the first is the root, the empty name; siblings stand together
	text  string // of all nodes: the label, then the first byte of each child's label
	rows  []row
	any   row
}

// row holds, for each operation, the index of a decision in View.decisions.
type row [operationCodes]uint32

type node struct {
	label  uint32 // where its label begins in the text: the bytes that lead here from the parent
	firsts uint32 // where its label ends and the children's first bytes begin
	fan    uint32 // how many children
	child  uint32 // index of the first child
	exact  uint32 // row for the name that ends here
	beyond uint32 // row for names that go on to no child: what the prefixes up to here say
}

func (t *tree) find(name string) uint32 {
	n := &t.nodes[0]
	for name != "" {
		i := strings.IndexByte(t.text[n.firsts:n.firsts+n.fan], name[0])
		if i < 0 {
			return n.beyond
		}
		child := &t.nodes[int(n.child)+i]
		rest, ok := strings.CutPrefix(name, t.text[child.label:child.firsts])
		if !ok {
			return n.beyond
		}
		n, name = child, rest
	}
	return n.exact
}

// access is an entry together with what it does and whose it is.
type access struct {
	entry
	rule  int // index of the rule among all
	deny  bool
	watch bool // its set is in observe mode
}

// claim is which rules want what for one operation on one name: index of the first such rule plus one, 0 for none.
type claim struct{ allow, deny, watchAllow, watchDeny int }

type claims [operationCodes]claim

func (c *claims) add(a access) {
	effective := a.operations.effective(!a.deny)
	for op := range c {
		if effective.has(kmsg.ACLOperation(op)) {
			at := c[op].of(a.deny, a.watch)
			if *at == 0 || a.rule+1 < *at {
				*at = a.rule + 1
			}
		}
	}
}

func (c *claim) of(deny, watch bool) *int {
	switch {
	case deny && watch:
		return &c.watchDeny
	case deny:
		return &c.deny
	case watch:
		return &c.watchAllow
	default:
		return &c.allow
	}
}

// verdict is a Decision before the rule's name is looked up.
type verdict struct {
	allowed, wouldDeny bool
	rule               int // index plus one, 0 for none
}

// decide resolves the claims. Sets in enforce mode decide alone, by default no; those in observe mode can then only add
// "would deny" by an explicit deny, and never widen what is granted. Where only sets in observe mode speak of the
// cluster, everything passes and they say what they would have refused.
func (c claim) decide(observed bool) verdict {
	switch {
	case observed && c.watchDeny != 0:
		return verdict{true, true, c.watchDeny}
	case observed:
		return verdict{true, c.watchAllow == 0, c.watchAllow}
	case c.deny != 0 || c.allow == 0:
		return verdict{false, false, c.deny}
	case c.watchDeny != 0:
		return verdict{true, true, c.watchDeny}
	default:
		return verdict{true, false, c.allow}
	}
}

func (v verdict) rank() int {
	switch {
	case !v.allowed:
		return 0
	case v.wouldDeny:
		return 1
	default:
		return 2
	}
}

// compile builds a view of the accesses. Observed tells that only sets in observe mode speak of the cluster.
func compile(accesses []access, observed bool, ruleName func(int) string) *View {
	v := &View{}
	c := compiler{view: v, observed: observed, ruleName: ruleName, known: map[verdict]uint32{}}
	slices.SortStableFunc(accesses, func(a, b access) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), strings.Compare(a.pattern.text, b.pattern.text))
	})
	for kind := kmsg.ACLResourceTypeTopic; int(kind) < resourceCodes; kind++ {
		n := 0
		for n < len(accesses) && accesses[n].kind == kind {
			n++
		}
		c.build(&v.trees[kind], accesses[:n])
		accesses = accesses[n:]
	}
	return v
}

type compiler struct {
	view     *View
	observed bool
	ruleName func(int) string
	known    map[verdict]uint32 // index of its decision

	tree *tree
	text []byte
	rows map[row]uint32
	any  [operationCodes]verdict
}

func (c *compiler) build(t *tree, accesses []access) {
	c.tree, c.text, c.rows, c.any = t, nil, map[row]uint32{}, [operationCodes]verdict{}
	t.nodes = make([]node, 1)
	c.fill(0, accesses, 0, 0, claims{})
	t.text = string(c.text)
	for op, v := range c.any {
		t.any[op] = c.decision(v)
	}
}

// fill completes node i. The accesses are those at and below it, sorted by text, equal up to end where the node's name
// ends; its label began at start. The claims are those of the prefixes above it.
func (c *compiler) fill(i int, accesses []access, start, end int, prefixes claims) {
	own := 0
	for own < len(accesses) && len(accesses[own].pattern.text) == end {
		own++
	}
	here, below := accesses[:own], accesses[own:]
	for _, a := range here {
		if a.pattern.prefix {
			prefixes.add(a)
		}
	}
	exact := prefixes
	for _, a := range here {
		if !a.pattern.prefix {
			exact.add(a)
		}
	}
	c.countAny(i, here, &prefixes, &exact)

	families := family(below, end)
	n := node{
		label: uint32(len(c.text)), firsts: uint32(len(c.text) + end - start), fan: uint32(len(families)),
		child: uint32(len(c.tree.nodes)), exact: c.row(&exact), beyond: c.row(&prefixes),
	}
	if end > start {
		c.text = append(c.text, accesses[0].pattern.text[start:end]...)
	}
	for _, f := range families {
		c.text = append(c.text, f[0].pattern.text[end])
	}
	c.tree.nodes[i] = n
	c.tree.nodes = append(c.tree.nodes, make([]node, len(families))...)
	for j, f := range families {
		c.fill(int(n.child)+j, f, end, shared(f), prefixes)
	}
}

// family splits sorted accesses by the byte at position at.
func family(accesses []access, at int) [][]access {
	var all [][]access
	for len(accesses) > 0 {
		n := 1
		for n < len(accesses) && accesses[n].pattern.text[at] == accesses[0].pattern.text[at] {
			n++
		}
		all = append(all, accesses[:n])
		accesses = accesses[n:]
	}
	return all
}

// shared is the length of what sorted texts begin with in common.
func shared(accesses []access) int {
	first, last := accesses[0].pattern.text, accesses[len(accesses)-1].pattern.text
	n := 0
	for n < len(first) && n < len(last) && first[n] == last[n] {
		n++
	}
	return n
}

// countAny keeps the best outcome any allow of the type has. A deny covers an allow when it applies to the whole
// pattern: that is what the claims at the pattern's own node say. Kafka compares operations as written here, without
// the implied ones, except on the pattern "*", which its first question (about a name nobody uses) finds with them.
func (c *compiler) countAny(i int, here []access, prefixes, exact *claims) {
	if i == 0 {
		for op := range c.any {
			c.any[op] = prefixes[op].decide(c.observed)
		}
	}
	for _, a := range here {
		if a.deny || a.watch != c.observed {
			continue
		}
		at := exact
		if a.pattern.prefix {
			at = prefixes
		}
		written := a.operations.effective(false)
		for op := range c.any {
			if !written.has(kmsg.ACLOperation(op)) {
				continue
			}
			best, v := &c.any[op], at[op].decide(c.observed)
			if v.rank() > best.rank() || v.rank() == best.rank() && v.allowed && v.rule < best.rule {
				*best = v
			}
		}
	}
}

func (c *compiler) row(cl *claims) uint32 {
	var r row
	for op := range r {
		r[op] = c.decision(cl[op].decide(c.observed))
	}
	i, ok := c.rows[r]
	if !ok {
		i = uint32(len(c.tree.rows))
		c.rows[r] = i
		c.tree.rows = append(c.tree.rows, r)
	}
	return i
}

func (c *compiler) decision(v verdict) uint32 {
	i, ok := c.known[v]
	if !ok {
		i = uint32(len(c.view.decisions))
		c.known[v] = i
		d := Decision{Allowed: v.allowed, WouldDeny: v.wouldDeny}
		if v.rule != 0 {
			d.Rule = c.ruleName(v.rule - 1)
		}
		c.view.decisions = append(c.view.decisions, d)
	}
	return i
}
