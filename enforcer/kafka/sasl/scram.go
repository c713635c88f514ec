package sasl

import (
	"bytes"
	"regexp"
	"strings"
)

// saslName is a name in which a comma is =2C and an equals sign =3D.
const saslName = `((?:[\x01-\x2b\x2d-\x3c\x3e-\x7f]|=2C|=3D)+)`

// scramFirst is ScramMessages.ClientFirstMessage of Apache Kafka: RFC 5802, section 7, without channel binding.
var scramFirst = regexp.MustCompile(`^n,(?:a=` + saslName + `)?,(?:m=[\x01-\x2b\x2d-\x7f]+,)?n=` + saslName +
	`,r=[\x21-\x2b\x2d-\x7e]+((?:,[A-Za-z]+=[\x01-\x2b\x2d-\x7f]+)*)$`)

var unescape = strings.NewReplacer("=2C", ",", "=3D", "=")

// tokenAuth is the extension of a client that logs in with a delegation token (KIP-48).
const tokenAuth = "tokenauth"

// scram reads the client's first message. As in Kafka an authzid must be the name.
func scram(msg []byte) (Claim, error) {
	m := scramFirst.FindSubmatch(msg)
	if m == nil {
		return Claim{}, ErrMalformed
	}
	name := unescape.Replace(string(m[2]))
	if len(m[1]) > 0 && string(m[1]) != name {
		return Claim{}, ErrMalformed
	}
	byToken, seen := false, false
	for extension := range bytes.SplitSeq(m[3], []byte{','}) {
		key, value, _ := bytes.Cut(extension, []byte{'='})
		if string(key) != tokenAuth {
			continue
		}
		if seen {
			return Claim{}, ErrMalformed
		}
		byToken, seen = strings.EqualFold(string(value), "true"), true
	}
	if byToken {
		return Claim{DelegationToken: name}, nil
	}
	return Claim{Principal: "User:" + name}, nil
}
