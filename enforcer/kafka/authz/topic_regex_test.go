package authz

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

// What re2j 1.8, which Kafka 4.4 has, says of the same.
func TestARegularExpressionStandsForTheTopicsThatFitAsAWhole(t *testing.T) {
	topics := []string{"orders", "orders.paid", "a", "ab", "aab", "A.B_c", "__consumer_offsets"}
	for expr, want := range map[string][]string{
		`orders`:             {"orders"},
		`orders.*`:           {"orders", "orders.paid"},
		`a|ab`:               {"a", "ab"},
		`a*?b`:               {"ab", "aab"},
		`(?U)a+b?`:           {"a", "ab", "aab"},
		`^orders$`:           {"orders"},
		`(?m)^a$`:            {"a"},
		`(?i)a\.b_C`:         {"A.B_c"},
		`\Qorders.p`:         nil,
		`\Qorders.paid`:      {"orders.paid"},
		`(?P<n>a)b|(?:__.*)`: {"ab", "__consumer_offsets"},
		`\bab\b`:             {"ab"},
		``:                   nil,
	} {
		re, err := compileTopics(expr)
		if err != nil {
			t.Errorf("%s: %v", expr, err)
		} else if got := keep(topics, re.matches); !slices.Equal(got, want) {
			t.Errorf("%s stands for %q, expected %q", expr, got, want)
		}
	}
	for expr, want := range map[string]string{
		`a)`:                             "regexp/syntax: internal error",
		`(?P<n>a)(?P<n>b)`:               "duplicate capture group name",
		`(?P<n-1>a)`:                     "invalid named capture",
		`\pX`:                            "invalid character class range",
		`[[:nope:]]`:                     "invalid character class range",
		`(?z)`:                           "invalid or unsupported Perl syntax",
		`a**`:                            "invalid nested repetition operator",
		`*`:                              "missing argument to repetition operator",
		`x{2000}`:                        "invalid repeat count",
		`[b-a]`:                          "invalid character class range",
		`\`:                              "trailing backslash at end of expression",
		strings.Repeat("a", maxString+1): "expression too large",
	} {
		if _, err := compileTopics(expr); err == nil || err.description != want {
			t.Errorf("%.20s: %v, expected %q", expr, err, want)
		}
	}
}

func TestASubscriptionIsReadBackFromWhatTheBrokerWasTold(t *testing.T) {
	for _, s := range []Subscription{
		{topics: []string{}, regex: `.*`},
		{topics: []string{"orders", "a,b:c%2C", `x\zklamm:`}, regex: `a:b,c\.d\\|\zklamm:[(]`},
		{topics: []string{"é"}, regex: `é+$^`},
	} {
		inert := s.inert()
		got := subscriptionOf([]string{"told"}, &inert)
		if !slices.Equal(got.topics, s.topics) || got.regex != s.regex || got.native ||
			!slices.Equal(got.told, []string{"told"}) {
			t.Errorf("%q is read as %+v, expected %+v", inert, got, s)
		}
		re := regexp.MustCompile(inert)
		for _, name := range []string{"", "klamm:", inert, s.regex, strings.TrimPrefix(inert, `\z`), "orders"} {
			if re.MatchString(name) {
				t.Errorf("%q matches %q", inert, name)
			}
		}
	}
}
