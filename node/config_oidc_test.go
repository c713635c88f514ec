package node

import (
	"strings"
	"testing"
	"time"

	"klamm/spiffe"
)

func TestIssuersHaveSafeDefaults(t *testing.T) {
	c, err := load(t, smallest+"oidc: [{issuer: 'https://issuer.test', audiences: [kafka]}]\n"+
		"kubernetes: {review: {server: 'https://10.96.0.1', token-file: token}}\n")
	if err != nil {
		t.Fatal(err)
	}
	i := c.OIDC[0]
	if i.Skew != 30*time.Second || i.MaxAge != 24*time.Hour || i.Refresh != 10*time.Minute || i.MaxStale != 24*time.Hour ||
		i.PrincipalClaim != "sub" || strings.Join(i.Algorithms, " ") != strings.Join(spiffe.DefaultAlgorithms, " ") {
		t.Errorf("%+v", i)
	}
	k := c.Kubernetes
	if k.Token != "/var/run/secrets/klamm/token" || k.Audience != "klamm" || k.Review.Every != 3*time.Second ||
		k.Review.MaxStale != 15*time.Second || !strings.HasSuffix(k.Review.TokenFile, "/token") {
		t.Errorf("%+v, %+v", k, k.Review)
	}
}

func TestWhatIsWrongWithIssuersAndTokensIsSaid(t *testing.T) {
	const issuer = "oidc: [{issuer: 'https://issuer.test', audiences: [kafka]}]\n"
	of := func(more string) string {
		return "oidc: [{issuer: 'https://i.test', audiences: [kafka], " + more + "}]\n"
	}
	review := func(more string) string { return "kubernetes: {review: {server: 'https://10.96.0.1', " + more + "}}\n" }
	for name, test := range map[string]struct{ text, want string }{
		"neither issuer nor trust domain": {"oidc: [{audiences: [kafka]}]", "2:8: give either issuer or trust-domain"},
		"both": {"oidc: [{issuer: 'https://i.test', trust-domain: a.test, audiences: [kafka]}]",
			"2:8: give either issuer or trust-domain"},
		"an unknown key": {of("audience: x"), `unknown key "audience", did you mean "audiences"?`},
		"plain http": {"oidc: [{issuer: 'http://i.test', audiences: [kafka]}]",
			`2:17: "http://i.test" is not https`},
		"no address":             {"oidc: [{issuer: i.test, audiences: [kafka]}]", `2:17: "i.test" is no address`},
		"keys by plain http":     {of("jwks: {url: 'http://i.test/k'}"), "is not https"},
		"keys from two places":   {of("jwks: {url: 'https://i.test/k', file: k}"), "give either url or file"},
		"keys from nowhere":      {of("jwks: {}"), "give either url or file"},
		"alg none":               {of("algorithms: [none]"), `unknown algorithm "none"`},
		"a symmetric algorithm":  {of("algorithms: [RS256, HS256]"), `unknown algorithm "HS256"`},
		"no algorithm":           {of("algorithms: []"), "no algorithm"},
		"a negative skew":        {of("skew: -1s"), "want 0s to 1m"},
		"a skew of an hour":      {of("skew: 1h"), "want 0s to 1m"},
		"a negative max age":     {of("max-age: -1s"), "want a duration like 24h"},
		"no principal":           {of("principal-claim: ''"), "the claim's name is empty"},
		"an empty claim":         {of("required-claims: ['']"), "it is empty"},
		"a refresh of a second":  {of("refresh: 1s"), "want 10s to 24h"},
		"stale before refreshed": {of("refresh: 1h, max-stale: 1m"), "want at least refresh"},
		"an empty audience":      {"oidc: [{issuer: 'https://i.test', audiences: ['']}]", "it is empty"},
		"an issuer nobody uses":  {"oidc: [{issuer: 'https://i.test'}]", "2:8: nothing uses it"},
		"an issuer twice": {"oidc:\n- {issuer: 'https://i.test', audiences: [a]}\n" +
			"- {issuer: 'https://i.test', audiences: [b]}",
			`4:3: a second issuer "https://i.test"`},
		"a trust domain without SPIRE": {"oidc: [{trust-domain: a.test, audiences: [kafka]}]",
			"the section spire is missing"},
		"a trust domain that is none": {"oidc: [{trust-domain: 'spiffe://a.test', audiences: [kafka]}]",
			"is no trust domain like"},
		"keys of a trust domain": {"oidc: [{trust-domain: a.test, audiences: [kafka], jwks: {file: x}}]",
			"come from the SPIRE agent"},

		"nothing proves tokens": {"kubernetes: {}", "2:13: nothing proves the tokens"},
		"an unknown issuer": {issuer + "kubernetes: {issuer: 'https://other.test'}",
			`3:22: "https://other.test" is no issuer of section oidc`},
		"a relative token": {review("token-file: t") + "token-file: [{path: token, issuer: x, audience: a}]",
			"want an absolute path"},
		"the API server's audience": {"kubernetes: {audience: 'https://kubernetes.default.svc.cluster.local', " +
			"review: {server: 'https://a', token-file: t}}",
			"2:24: that is the API server's own audience"},
		"the issuer as audience": {issuer + "kubernetes: {audience: 'https://issuer.test', issuer: 'https://issuer.test'}",
			"that is the API server's own audience"},
		"no audience": {"kubernetes: {audience: '', review: {server: 'https://a', token-file: t}}",
			"it is empty"},
		"no credentials": {"kubernetes: {review: {server: 'https://a'}}",
			"give either token-file, or cert and key"},
		"two credentials":    {review("token-file: t, cert: c, key: k"), "give either token-file, or cert and key"},
		"half a certificate": {review("cert: c"), "cert and key are given together"},
		"reviews by plain http": {"kubernetes: {review: {server: 'http://127.0.0.1', token-file: t}}",
			"want an address like https://"},
		"reviews all the time":   {review("token-file: t, every: 1ms"), "want 1s to 1m"},
		"reviews that never end": {review("token-file: t, max-stale: 24h"), "want at least every, and up to 1h"},

		"a token file without issuer": {"token-file: [{path: /t, audience: a}]", `the key "issuer" is missing`},
		"a token file of an unknown issuer": {issuer + "token-file: [{path: /t, issuer: 'https://other.test', audience: a}]",
			`3:33: "https://other.test" is no issuer`},
		"a token file for nobody": {issuer + "token-file: [{path: /t, issuer: 'https://issuer.test', audience: ''}]",
			"it is empty"},
		"an unconfigured source": {"attestation: {sources: [kubernetes]}", `kubernetes needs the section "kubernetes"`},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := load(t, smallest+test.text); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got  %v\nwant %s", err, test.want)
			}
		})
	}
}

func TestATrustDomainIsNamedByItsSPIFFEID(t *testing.T) {
	c, err := load(t, smallest+"spire: {api: delegated, socket: /run/admin.sock}\n"+
		"oidc: [{trust-domain: a.test}]\ntoken-file: [{path: /t, issuer: 'spiffe://a.test', audience: kafka}]\n")
	if err != nil || c.OIDC[0].Name() != "spiffe://a.test" {
		t.Errorf("%v, %+v", err, c.OIDC)
	}
}

func TestTheAPIServersAudienceIsAcceptedWhenAskedFor(t *testing.T) {
	_, err := load(t, smallest+"kubernetes: {audience: 'https://kubernetes.default.svc', api-server-audience: true, "+
		"review: {server: 'https://10.96.0.1', token-file: t}}")
	if err != nil {
		t.Error(err)
	}
}

func TestAnIssuersNameMayBeNoAddressWhereItsKeysAreElsewhere(t *testing.T) {
	_, err := load(t, smallest+"oidc: [{issuer: kubernetes/serviceaccount, audiences: [a], jwks: {file: k}}]")
	if err != nil {
		t.Error(err)
	}
}
