package sasl

import (
	"bytes"
	"regexp"
)

// Of OAuthBearerClientInitialResponse of Apache Kafka: RFC 7628, section 3.1, without channel binding.
var (
	bearerFirst = regexp.MustCompile(`^n,(?:a=` + saslName + `)?,\x01((?:[A-Za-z]+=[\x21-\x7e \t\r\n]+\x01)*)\x01$`)
	bearerAuth  = regexp.MustCompile(`^(?i:bearer) +([-_~+/.a-zA-Z0-9]+=*)$`)
)

// bearer reads the client's message. Kafka takes the last of several auth keys, others the first: there must be one.
func bearer(msg []byte) (Claim, error) {
	m := bearerFirst.FindSubmatch(msg)
	if m == nil {
		return Claim{}, ErrMalformed
	}
	c := Claim{AuthzID: string(m[1])}
	for pair := range bytes.SplitSeq(m[2], []byte{1}) {
		key, value, _ := bytes.Cut(pair, []byte{'='})
		if string(key) != "auth" {
			continue
		}
		auth := bearerAuth.FindSubmatch(value)
		if auth == nil || c.Token != nil {
			return Claim{}, ErrMalformed
		}
		c.Token = auth[1]
	}
	if c.Token == nil {
		return Claim{}, ErrMalformed
	}
	return c, nil
}
