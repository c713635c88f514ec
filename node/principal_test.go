package node

import (
	"errors"
	"testing"

	"klamm/test/bounds"
)

func TestKafkasRulesMapSubjects(t *testing.T) {
	const orders = "CN=Orders.Shop,O=SPIRE,C=US"
	for name, c := range map[string]struct{ rules, want string }{
		"none":            {"", orders},
		"the default":     {"DEFAULT", orders},
		"the common name": {"RULE:^CN=([^,]+),O=SPIRE,C=US$/$1/,DEFAULT", "Orders.Shop"},
		"in lower case":   {`RULE:CN=(.*?),.*/$1/L`, "orders.shop"},
		"in upper case":   {"RULE:^CN=(.*?),.*$/$1@x/U, DEFAULT", "ORDERS.SHOP@X"},
		"two groups":      {"RULE:CN=(.*?),O=(.*?),.*/$2-$1_/", "SPIRE-Orders.Shop_"},
		"the second":      {"RULE:^CN=other,.*$/other/,\n RULE:.*C=(US)/$1/", "US"},
		"a whole match":   {"RULE:CN=Orders/half/, DEFAULT", orders},
		"a slash in it":   {`RULE:^CN=(.*?),.*\/?.*$/$1/`, "Orders.Shop"},
		"no rule at all":  {"RULE:^CN=other$/other/", ""},
	} {
		t.Run(name, func(t *testing.T) {
			m, err := parseMapping(c.rules)
			if err != nil {
				t.Fatal(err)
			}
			got, err := m.principal(orders)
			if got != c.want || (c.want == "") != errors.Is(err, errNoRule) {
				t.Errorf("it is %q, %v", got, err)
			}
		})
	}
	for _, wrong := range []string{"default", "RULE:", "RULE:a", "RULE:a/b", "RULE:(/b/", "RULE:a/b/x", "a/b/"} {
		if m, err := parseMapping(wrong); err == nil {
			t.Errorf("%q is read as %v", wrong, m)
		}
	}
}

func FuzzMapping(f *testing.F) {
	f.Add("RULE:^CN=([^,]+),O=SPIRE,C=US$/$1/L,DEFAULT", unnamed)
	f.Add(`RULE:a\/b/$0/, RULE:(x)(y)/$2$1/U`, "xy")
	f.Fuzz(func(t *testing.T, rules, subject string) {
		var m mapping
		var err error
		bounds.Check(t, len(rules), 1<<14, func() { m, err = parseMapping(rules) })
		if err != nil {
			return
		}
		if got, err := m.principal(subject); err == nil && len(m) == 0 && got != subject {
			t.Errorf("without rules %q becomes %q", subject, got)
		}
	})
}
